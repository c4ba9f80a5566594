// Which products there are to make of a block of queries and a tile, where each query sees one range of
// keys whose ends only grow, as under a causal mask or a window: those of hidden keys are left out.

struct Stairs {
    bool is_whole;  // everybody sees everything, or what they see is not known row by row
    int64_t queries, keys;
    Span of_query[BLOCK_QUERIES];  // keys that it sees, counted from the first
    Span of_key[TILE_KEYS];        // from the first query that sees it, or keys behind it alone, to
                                   // the first that sees keys behind it alone; for sums over queries

    // Of `num_keys` keys from `first_key` on.
    Stairs(const Sight &sight, const QueryBlock &block, int64_t first_key, int64_t num_keys,
           bool has_sums = false)
        : is_whole(true), queries(block.count), keys(num_keys) {
        if (sight.key_positions) return;
        const auto seen = [&](int64_t query) {
            const Range range = sight.of_position(sight.position(block.first + query));
            const int64_t begin = smaller(larger(range.low - first_key, 0), keys);
            return Span{begin, smaller(larger(range.high - first_key, begin), keys)};
        };
        is_whole = seen(0).end == keys && seen(queries - 1).begin == 0;
        if (is_whole) return;
        for (int64_t query = 0; query < queries; ++query) of_query[query] = seen(query);
        int64_t begin = 0, end = 0;
        for (int64_t key = 0; has_sums && key < keys; ++key) {
            while (begin < queries && of_query[begin].end <= key) ++begin;
            while (end < queries && of_query[end].begin <= key) ++end;
            of_key[key] = {begin, larger(begin, end)};
        }
    }

    // Keys that some of these queries see: the depth of their products with values.
    Span keys_of(int64_t query, int64_t count) const {
        if (is_whole) return {0, keys};
        const int64_t last = smaller(query + count, queries) - 1;
        return {of_query[query].begin, of_query[last].end};
    }

    // Queries that see some of these keys: the depth of sums over queries.
    Span queries_of(int64_t key, int64_t count) const {
        if (is_whole) return {0, queries};
        const int64_t last = smaller(key + count, keys) - 1;
        return {of_key[key].begin, larger(of_key[key].begin, of_key[last].end)};
    }

    // Of features, for the scores of some queries and keys: all, or none where nobody sees any.
    Span features_of(int64_t query, int64_t num_queries, int64_t key, int64_t num_keys,
                     int64_t features) const {
        const Span seen = keys_of(query, num_queries);
        return {0, seen.begin < key + num_keys && key < seen.end ? features : 0};
    }
};
