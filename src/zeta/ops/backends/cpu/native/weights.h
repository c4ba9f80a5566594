// Attention weights, before dropout: of every head, or averaged over heads, which are then looped
// over inside, so that nothing larger than the result is held. lse and the output of a call without
// dropout are made too, where they have a place.
//
// A block of queries holds its scores of all keys; products, softmax and result follow each other
// while they are near. The order of all sums depends on the call's sizes alone.

// As many scores as a block of queries should have: smaller ones pass over all keys more often.
constexpr int64_t WEIGHT_FLOATS = 1 << 19;
constexpr int64_t ALONE_SCORES = 1 << 14;  // as many as one thread makes before others wake up

// How a call is cut.
struct WeightsPlan {
    int64_t stride, rows, blocks, num_tiles;

    explicit WeightsPlan(const ZetaCall &call) {
        num_tiles = divide_up(call.source, TILE_KEYS);
        stride = row_stride(num_tiles * TILE_KEYS);
        rows = smaller(BLOCK_QUERIES, larger(16, round_down(WEIGHT_FLOATS / stride, 16)));
        rows = smaller(rows, round_up(call.target, 16));
        blocks = divide_up(call.target, rows);
    }
};

template <class Operands>
struct WeightsBlock {
    typename Operands::Rows queries;
    float *scores, *means;
    float *maxima;
    KeyTile *tile;
    bool *is_seen;  // of each tile of keys
    typename Operands::Weights weights;  // of a tile; this and the sums for an output
    float *sums;
    int64_t sum_stride;

    static WeightsBlock plan(Pieces &pieces, const ZetaCall &call, const WeightsPlan &plan) {
        WeightsBlock block{};
        block.queries = Operands::Rows::plan(pieces, plan.rows, call.head_dim, false);
        block.scores = pieces.take<float>(plan.rows * plan.stride);
        block.means = pieces.take<float>(call.mean_weights ? plan.rows * plan.stride : 0);
        block.maxima = pieces.take<float>(plan.rows);
        block.tile = pieces.take<KeyTile>(1);
        block.is_seen = pieces.take<bool>(plan.num_tiles);
        block.sum_stride = row_stride(call.value_dim);
        if (!call.out.data) return block;
        block.weights = Operands::Weights::plan(pieces, plan.rows, TILE_KEYS, true, false);
        block.sums = pieces.take<float>(plan.rows * block.sum_stride);
        return block;
    }
};

// Calls `body(first, count, is_seen)` for every tile of keys.
template <class Operands, class Body>
inline void for_tiles(const WeightsBlock<Operands> &block, const ZetaCall &call, const Body &body) {
    for (int64_t first = 0; first < call.source; first += TILE_KEYS)
        body(first, smaller(TILE_KEYS, call.source - first), block.is_seen[first / TILE_KEYS]);
}

// Scores of a block of queries of one head with all keys that it may see.
template <class Operands>
inline void score_all(const WeightsBlock<Operands> &block, const WeightsPlan &plan,
                      const QueryBlock &queries, const Scores &scores,
                      const typename Operands::Columns &keys) {
    const ZetaCall &call = scores.call;
    const Sight &sight = scores.sight;
    block.queries.copy(head_rows(call.query, call.dtype, scores.batch, scores.head), queries.first,
                       queries.count, static_cast<float>(call.scale));
    for (int64_t row = 0; row < queries.count; ++row) block.maxima[row] = -INFINITY;
    for (int64_t first = 0; first < call.source; first += TILE_KEYS) {
        bool &is_seen = block.is_seen[first / TILE_KEYS];
        const int64_t count = smaller(TILE_KEYS, call.source - first);
        is_seen = first < queries.keys.high && first + count > queries.keys.low &&
                  queries.look_at(sight, first, count, *block.tile);
        if (!is_seen) continue;
        float *to = block.scores + first;
        Operands::make_scores(block.queries, keys, first, to, plan.stride,
                              Stairs(sight, queries, first, count));
        for (int64_t row = 0; row < queries.count; ++row) {
            float *of_row = to + row * plan.stride;
            const ScoreRow score_row(scores, *block.tile, queries.first + row);
            const float highest = largest(finish_row(score_row, of_row));
            // NaN stays, and makes the whole row NaN.
            if (!(highest <= block.maxima[row])) block.maxima[row] = highest;
        }
    }
}

// Exponentials of a row of scores, in place; returns their sum.
template <class Operands>
inline float exponentials_of_row(const WeightsBlock<Operands> &block, const ZetaCall &call,
                                 float *scores, float highest) {
    const float base = highest == -INFINITY ? 0 : highest;
    Floats total = zeros();
    for_tiles(block, call, [&](int64_t first, int64_t count, bool is_seen) {
        if (!is_seen) return;
        // Up to a whole vector: what is behind the last key is hidden.
        total = total + exponentials(scores, first, first + count, base,
                                     [](int64_t, Floats weight) { return weight; });
    });
    return sum(total);
}

template <class T>
inline void write_weights(T *to, const float *from, float factor, int64_t count) {
    int64_t key = 0;
    for (; key <= count - LANES; key += LANES) store(to + key, load(from + key) * splat(factor));
    if (key < count) store_first(to + key, load(from + key) * splat(factor), count - key);
}

// Keys, and values for an output, of all heads, packed.
template <class Operands>
struct PackedHeads {
    char *data;
    int64_t head_bytes;

    static PackedHead<Operands> plan(Pieces &pieces, const ZetaCall &call,
                                     const WeightsPlan &plan) {
        const int64_t length = plan.num_tiles * TILE_KEYS;
        PackedHead<Operands> head{};
        head.keys = Operands::Columns::plan(pieces, length, call.head_dim);
        if (call.out.data) head.values = Operands::Values::plan(pieces, length, call.value_dim);
        return head;
    }

    static int64_t bytes_of_head(const ZetaCall &call, const WeightsPlan &of_weights) {
        Pieces pieces(nullptr);
        plan(pieces, call, of_weights);
        return pieces.bytes();
    }

    PackedHead<Operands> head(const ZetaCall &call, const WeightsPlan &of_weights, int64_t batch,
                              int64_t key_head) const {
        Pieces pieces(data + (batch * call.key_heads + key_head) * head_bytes);
        return plan(pieces, call, of_weights);
    }

    void pack(const ZetaCall &call, Unseen &unseen, const WeightsPlan &plan,
              int64_t num_threads) const {
        run(call.batch * call.key_heads * plan.num_tiles, num_threads, [&](int64_t task) {
            const int64_t first = task % plan.num_tiles * TILE_KEYS, rest = task / plan.num_tiles;
            const int64_t batch = rest / call.key_heads, key_head = rest % call.key_heads;
            const Sight sight(call, unseen, batch);
            const int64_t count = smaller(TILE_KEYS, call.source - first);
            const PackedHead<Operands> to = head(call, plan, batch, key_head);
            if (call.out.data)
                to.pack(sight, key_head, first, count);
            else
                to.keys.pack(keys_of(sight, key_head), first, count, first);
        });
    }
};

// The output of a block of queries of one head, from exponentials and their sums.
template <class Operands>
inline void add_up_values(WeightsBlock<Operands> &block, const WeightsPlan &plan,
                          const QueryBlock &queries, const Scores &scores,
                          const typename Operands::Values &values, const float *factors) {
    const ZetaCall &call = scores.call;
    clear(block.sums, queries.count * block.sum_stride);
    for_tiles(block, call, [&](int64_t first, int64_t count, bool is_seen) {
        // Not what lies behind the last key that is seen: it may be NaN.
        count = smaller(count, queries.keys.high - first);
        if (!is_seen || count <= 0) return;
        block.weights.take(block.scores + first, plan.stride, queries.count, count);
        Operands::make_outputs(block.weights, values, first, block.sums, block.sum_stride, true,
                               Stairs(scores.sight, queries, first, count));
    });
    scores.sight.unseen.look_at(block.sums, queries.count, call.value_dim, block.sum_stride);
    HeadRows out = head_rows(call.out, call.dtype, scores.batch, scores.head);
    for (int64_t row = 0; row < queries.count; ++row)
        store_sums(call, block.sums + row * block.sum_stride, factors[row],
                   out.at(queries.first + row));
}

// The weights of a block of queries of one head, or what it adds to the mean.
template <class T, class Operands>
inline void weigh_block(WeightsBlock<Operands> &block, const WeightsPlan &plan,
                        const QueryBlock &queries, const Scores &scores,
                        const PackedHead<Operands> &packed) {
    const ZetaCall &call = scores.call;
    score_all(block, plan, queries, scores, packed.keys);
    const int64_t first_row =
        (scores.batch * call.heads + scores.head) * call.target + queries.first;
    float factors[BLOCK_QUERIES];
    for (int64_t row = 0; row < queries.count; ++row) {
        float *from = block.scores + row * plan.stride;
        const float highest = block.maxima[row];
        const float total = exponentials_of_row(block, call, from, highest);
        if (call.lse_BHT) call.lse_BHT[first_row + row] = log_sum_exp(highest, total);
        const float factor = factors[row] = total == 0 ? 0 : 1 / total;
        float *means = block.means + row * plan.stride;
        T *to = static_cast<T *>(call.weights) + (first_row + row) * call.source;
        for_tiles(block, call, [&](int64_t first, int64_t count, bool is_seen) {
            if (!call.mean_weights) {
                if (is_seen)
                    write_weights(to + first, from + first, factor, count);
                else
                    memset(static_cast<void *>(to + first), 0, count * sizeof(T));
                return;
            }
            for (int64_t key = first; is_seen && key < first + count; key += LANES)
                store(means + key, fma(load(from + key), splat(factor), load(means + key)));
        });
    }
    if (call.out.data) add_up_values(block, plan, queries, scores, packed.values, factors);
}

template <class T, class Operands>
inline void weights_task(const ZetaCall &call, Unseen &unseen, const WeightsPlan &plan,
                         WeightsBlock<Operands> &block, const PackedHeads<Operands> &packed,
                         const OffsetTable &offsets, int64_t task) {
    const int64_t heads = call.mean_weights ? call.heads : 1;
    const int64_t first = task % plan.blocks * plan.rows, rest = task / plan.blocks * heads;
    const int64_t batch = rest / call.heads, group = call.heads / call.key_heads;
    const Sight sight(call, unseen, batch);
    const QueryBlock queries(sight, first, smaller(plan.rows, call.target - first));
    if (call.mean_weights) clear(block.means, queries.count * plan.stride);
    for (int64_t head = rest % call.heads; head < rest % call.heads + heads; ++head) {
        const Scores scores = scores_of<Operands>(call, sight, offsets, batch, head);
        weigh_block<T>(block, plan, queries, scores, packed.head(call, plan, batch, head / group));
    }
    T *to = static_cast<T *>(call.weights) + (batch * call.target + first) * call.source;
    const float factor = 1 / static_cast<float>(call.heads);
    for (int64_t row = 0; call.mean_weights && row < queries.count; ++row)
        write_weights(to + row * call.source, block.means + row * plan.stride, factor, call.source);
}

template <class T, class Operands>
inline int64_t weights_in(const ZetaCall &call, Unseen &unseen) {
    const WeightsPlan plan(call);
    PackedHeads<Operands> packed{nullptr, PackedHeads<Operands>::bytes_of_head(call, plan)};
    const int64_t packed_bytes = call.batch * call.key_heads * packed.head_bytes;
    const int64_t offset_floats =
        call.offsets_HR ? call.heads * OffsetTable::length_of(call) : 0;
    Shared memory(packed_bytes + offset_floats * static_cast<int64_t>(sizeof(float)));
    if (!memory.data()) return ZETA_NO_MEMORY;
    packed.data = memory.data();
    OffsetTable offsets{};
    if (call.offsets_HR)
        offsets = make_offsets(call, reinterpret_cast<float *>(memory.data() + packed_bytes));
    Pieces count(nullptr);
    WeightsBlock<Operands>::plan(count, call, plan);
    const bool is_small = call.batch * call.heads * call.target * call.source < ALONE_SCORES;
    const int64_t num_threads = is_small ? 1 : call.num_threads;
    packed.pack(call, unseen, plan, num_threads);
    const int64_t planes = call.batch * (call.mean_weights ? 1 : call.heads);
    const auto work = [&](Pieces &pieces, Tasks &tasks) {
        [[maybe_unused]] const typename Operands::Session session;
        auto block = WeightsBlock<Operands>::plan(pieces, call, plan);
        for (int64_t task; (task = tasks.take()) >= 0;)
            weights_task<T>(call, unseen, plan, block, packed, offsets, task);
    };
    return run_with_scratch(count.bytes(), planes * plan.blocks, num_threads, work);
}

// T is the dtype of the call.
template <class T, class Operands>
inline int64_t weights_with(const ZetaCall &call) {
    return run_without_unseen(
        call, [&](Unseen &unseen) { return weights_in<T, Operands>(call, unseen); });
}
