// Which keys a query sees by position and document: a range of positions for each query, and tiles
// that nobody looks into.

struct Range {
    int64_t low, high;  // low .. high - 1

    bool has(int64_t x) const { return low <= x && x < high; }
};

// Which keys there are at all. What lies at the others is never read as a number: it may be NaN.
struct Existing {
    int64_t first, length;        // before and from there on, nobody sees any
    const int32_t *positions;     // none where negative
    int64_t padding;              // of the positions
    const uint8_t *keep;          // a mask that is the same for all queries and heads
    int64_t keep_stride;

    bool has(int64_t key) const {
        if (key < first || key >= length) return false;
        if (positions && (positions[key] < 0 || positions[key] >= padding)) return false;
        return !keep || keep[key * keep_stride];
    }
};

// Keys that exist, and that no query sees all the same.
//
// At first they are not told from others: their weights are 0, whatever they are. But 0 x NaN is NaN. So
// where the masks of a call may hide keys from all, and its sums are not finite, its pass is run again,
// and such keys are left out.
struct Unseen {
    const bool may_be;
    bool are_left_out = false;
    bool were_met = false;  // perhaps

    explicit Unseen(const ZetaCall &call)
        : may_be(call.document_columns.data ||
                 (call.keep.data && (call.keep.row || call.keep.head)) ||
                 (call.key_positions.data && (call.causal || call.window || call.prefix_B))) {}

    // Looks at rows of sums that keys or values have gone into.
    void look_at(const float *sums, int64_t count, int64_t width, int64_t stride) {
        if (!may_be) return;
        Mask found = first_lanes(0);
        for (int64_t row = 0; row < count; ++row)
            for (int64_t column = 0; column < width; column += LANES) {
                const Floats size = abs(load(sums + row * stride + column));
                found = either(found, not_less(size, splat(INFINITY)));
            }
        if (any(found)) __atomic_store_n(&were_met, true, __ATOMIC_RELAXED);
    }
};

// Runs `pass(unseen)`, once or twice.
template <class Pass>
inline int64_t run_without_unseen(const ZetaCall &call, const Pass &pass) {
    Unseen unseen(call);
    const int64_t answer = pass(unseen);
    if (answer != ZETA_DONE || !unseen.were_met) return answer;
    unseen.are_left_out = true;
    return pass(unseen);
}

// What one sequence of the batch hides.
struct Sight {
    const ZetaCall &call;
    Unseen &unseen;
    int64_t batch;
    bool is_causal;
    int64_t window, prefix, padding;  // 0, -1 and the length of the keys where there is none
    int64_t target, source;
    const int32_t *query_positions, *key_positions;  // both or none
    const int64_t *document_rows, *document_columns;  // both or none
    Existing existing;

    Sight(const ZetaCall &call, Unseen &unseen, int64_t batch)
        : call(call),
          unseen(unseen),
          batch(batch),
          is_causal(call.causal),
          window(call.window),
          prefix(call.prefix_B ? larger(0, call.prefix_B[batch]) : -1),
          padding(INT32_MAX),
          target(call.target),
          source(call.source),
          query_positions(of<int32_t>(call.query_positions, batch)),
          key_positions(of<int32_t>(call.key_positions, batch)),
          document_rows(of<int64_t>(call.document_rows, batch)),
          document_columns(of<int64_t>(call.document_columns, batch)) {
        if (call.padding_B) padding = smaller(padding, larger(0, call.padding_B[batch]));
        if (!key_positions) padding = smaller(padding, source);
        const int64_t first = key_positions ? 0 : of_position(position(0)).low;
        existing = {first, key_positions ? source : padding, key_positions, padding, nullptr, 0};
        if (call.keep.data && call.keep.row == 0 && call.keep.head == 0) {
            existing.keep = static_cast<const uint8_t *>(call.keep.data) + batch * call.keep.batch;
            existing.keep_stride = call.keep.column;
        }
    }

    // Whether a key may be multiplied for the heads that share it.
    bool has(int64_t key, int64_t key_head) const {
        return existing.has(key) && (!unseen.are_left_out || is_seen(key, key_head));
    }

    // Whether it has some keys one after the other, where that is known without looking at each.
    bool has_all(int64_t first, int64_t count) const {
        return first >= existing.first && first + count <= existing.length &&
               !existing.positions && !existing.keep && !unseen.are_left_out;
    }

    int64_t position(int64_t query) const {
        return query_positions ? query_positions[query] : query + source - target;
    }

    // The positions of keys that a query at this position sees.
    Range of_position(int64_t position) const {
        Range range{0, padding};
        if (prefix >= 0) range.high = smaller(range.high, larger(position + 1, prefix));
        if (is_causal) range.high = smaller(range.high, position + 1);
        if (window) range.low = larger(0, position - window + 1);
        range.high = larger(range.high, range.low);
        return range;
    }

    // The keys that a block of queries may see; all of them under explicit positions.
    Range of_queries(int64_t first, int64_t count) const {
        if (query_positions) return {0, source};
        const Range one = of_position(position(first));
        const Range last = of_position(position(first + count - 1));
        // Both ends only grow with the position.
        return {smaller(one.low, source), smaller(last.high, source)};
    }

  private:
    bool is_seen(int64_t key, int64_t key_head) const {
        const int64_t group = call.heads / call.key_heads, first = key_head * group;
        const int64_t heads = call.keep.data && call.keep.head ? group : 1;
        // From the query that stands where the key does: it, or one of those behind it, most often does.
        const int64_t own = larger(0, smaller(key + target - source, target - 1));
        for (int64_t head = first; head < first + heads; ++head)
            for (int64_t index = 0; index < target; ++index)
                if (sees(head, (own + index) % target, key)) return true;
        return false;
    }

    bool sees(int64_t head, int64_t query, int64_t key) const {
        if (!of_position(position(query)).has(key_positions ? key_positions[key] : key))
            return false;
        if (document_columns && document_rows[query] != document_columns[key]) return false;
        const ZetaPlane &keep = call.keep;
        return !keep.data ||
               static_cast<const uint8_t *>(keep.data)[batch * keep.batch + head * keep.head +
                                                       query * keep.row + key * keep.column];
    }

    template <class T>
    static const T *of(const ZetaLabels &labels, int64_t batch) {
        return labels.data ? static_cast<const T *>(labels.data) + batch * labels.batch : nullptr;
    }
};

constexpr int64_t BLOCK_QUERIES = 96;
constexpr int64_t TILE_KEYS = ZETA_TILE_KEYS;

// The least and the greatest of some numbers.
struct Ends {
    int64_t lowest, highest;

    template <class T>
    static Ends of(const T *numbers, int64_t count) {
        T lowest = numbers[0], highest = numbers[0];
        for (int64_t index = 1; index < count; ++index) {
            lowest = numbers[index] < lowest ? numbers[index] : lowest;
            highest = numbers[index] > highest ? numbers[index] : highest;
        }
        return {lowest, highest};
    }

    bool meet(const Ends &others) const {
        return lowest <= others.highest && others.lowest <= highest;
    }
};

// A tile's keys. What is behind the last one, up to a whole vector, is hidden.
struct KeyTile {
    int64_t first, count, padded;
    Ends ends;  // of positions; -1 is the lowest of a tile with a key that is none
    bool has_documents;
    alignas(64) int32_t positions[TILE_KEYS];
    alignas(64) int32_t hashes[TILE_KEYS];
    alignas(64) int64_t documents[TILE_KEYS];

    // Some keys; the rest of it is for those that anybody may see.
    void begin(const Sight &sight, int64_t first_key, int64_t num_keys) {
        first = first_key;
        count = num_keys;
        padded = round_up(count, LANES);
        ends = {first, first + padded - 1};
        if (!sight.key_positions) return;
        ends = Ends::of(sight.key_positions + first, count);
        if (count < padded) ends.lowest = smaller(ends.lowest, -1);
    }

    void finish(const Sight &sight) {
        has_documents = sight.document_columns;
        for (int64_t key = 0; sight.key_positions && key < padded; ++key)
            positions[key] = key < count ? sight.key_positions[first + key] : -1;
        for (int64_t key = 0; has_documents && key < padded; ++key)
            documents[key] = sight.document_columns[first + smaller(key, count - 1)];
    }

    void set_hashes(const Sight &sight, uint32_t salt) {
        for (int64_t key = 0; key < padded; key += LANES) {
            const Ints index = add(lane_numbers(), splat_int(static_cast<int32_t>(first + key)));
            const Ints position = sight.key_positions ? load_ints(positions + key) : index;
            store_ints(hashes + key, column_hashes(salt, position));
        }
    }
};

// A block of queries: what they see, together.
struct QueryBlock {
    int64_t first, count;
    Range keys;
    Range positions{};  // that they see, where these are explicit
    Ends documents{};   // their own, where there are any

    QueryBlock(const Sight &sight, int64_t first_query, int64_t num_queries)
        : first(first_query), count(num_queries), keys(sight.of_queries(first, count)) {
        if (sight.document_rows) documents = Ends::of(sight.document_rows + first, count);
        if (!sight.query_positions) return;
        positions = sight.of_position(sight.position(first));
        for (int64_t query = first + 1; query < first + count; ++query) {
            const Range range = sight.of_position(sight.position(query));
            positions.low = smaller(positions.low, range.low);
            positions.high = larger(positions.high, range.high);
        }
    }

    // Makes a tile of some of `keys`, unless nobody sees anything of it.
    bool look_at(const Sight &sight, int64_t first_key, int64_t num_keys, KeyTile &tile) const {
        tile.begin(sight, first_key, num_keys);
        const Ends &ends = tile.ends;
        if (sight.key_positions &&
            (ends.highest < positions.low || ends.lowest >= positions.high || ends.highest < 0))
            return false;
        if (sight.document_columns &&
            !documents.meet(Ends::of(sight.document_columns + first_key, num_keys)))
            return false;
        tile.finish(sight);
        return true;
    }
};
