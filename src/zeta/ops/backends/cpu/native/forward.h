// Attention, forward: blocks of queries walk over tiles of keys with an online softmax.
//
// The results of a query depend on nothing but the call: not on the number of threads.

// A row is rescaled only when its maximum grows by more than this, log 256: until then its
// exponentials are at most 2^8 times too large.
constexpr float RESCALE_FROM = 5.5f;

constexpr int64_t FEW_TASKS = 4;
// A head alone of so many queries is worth a second thread that packs the same keys for itself.
constexpr int64_t SHARED_QUERIES = 32;

// Whether there is one head alone, of one block of queries and one tile, that two threads may share. It is
// cut in two whether they do or not: which queries are multiplied together decides who meets a NaN.
inline bool is_shared(const ZetaCall &call) {
    return call.batch * call.heads == 1 && call.target >= SHARED_QUERIES &&
           call.target <= BLOCK_QUERIES && call.source <= TILE_KEYS;
}

// Queries of a block: cut evenly where there are only a few blocks to share out among threads.
inline int64_t queries_of_block(const ZetaCall &call) {
    const int64_t blocks = is_shared(call) ? 2 : divide_up(call.target, BLOCK_QUERIES);
    if (call.batch * call.heads * blocks >= FEW_TASKS) return BLOCK_QUERIES;
    return round_up(divide_up(call.target, blocks), 4);
}

// Keys and values of one head, packed to be multiplied.
template <class Operands>
struct PackedHead {
    typename Operands::Columns keys;
    typename Operands::Values values;

    static PackedHead plan(Pieces &pieces, const ZetaCall &call) {
        return {Operands::Columns::plan(pieces, call.source, call.head_dim),
                Operands::Values::plan(pieces, call.source, call.value_dim)};
    }

    void pack(const Sight &sight, int64_t key_head, int64_t first, int64_t count) const {
        keys.pack(keys_of(sight, key_head), first, count, first);
        values.pack(values_of(sight, key_head), first, count, first);
    }
};

inline float exponential(float x) {
    float lanes[LANES];
    store(lanes, exp(splat(x)));
    return lanes[0];
}

// Of a row, from its base and the sum of its exponentials less that; -inf where nothing is seen.
inline float log_sum_exp(float base, float total) {
    return total == 0 ? -INFINITY
                      : static_cast<float>(base + log(static_cast<double>(total)));
}

inline void scale_row(float *row, int64_t width, float factor) {
    for (int64_t column = 0; column < width; column += LANES)
        store(row + column, load(row + column) * splat(factor));
}

// A block of queries under way.
template <class Operands>
struct ForwardBlock {
    typename Operands::Rows queries;
    typename Operands::Weights weights;
    float *scores, *sums;
    float *maxima, *totals;
    KeyTile *tile;
    int64_t score_stride, sum_stride;

    static ForwardBlock plan(Pieces &pieces, const ZetaCall &call) {
        ForwardBlock block;
        block.score_stride = row_stride(TILE_KEYS);
        block.sum_stride = row_stride(call.value_dim);
        block.queries = Operands::Rows::plan(pieces, BLOCK_QUERIES, call.head_dim, false);
        block.weights =
            Operands::Weights::plan(pieces, BLOCK_QUERIES, TILE_KEYS, true, false);
        block.scores = pieces.take<float>(BLOCK_QUERIES * block.score_stride);
        block.sums = pieces.take<float>(BLOCK_QUERIES * block.sum_stride);
        block.maxima = pieces.take<float>(BLOCK_QUERIES);
        block.totals = pieces.take<float>(BLOCK_QUERIES);
        block.tile = pieces.take<KeyTile>(1);
        return block;
    }

    void rescale(int64_t row, float highest, int64_t width) const {
        const float factor = exponential(maxima[row] - highest);
        maxima[row] = highest;
        totals[row] *= factor;
        scale_row(sums + row * sum_stride, width, factor);
    }
};

// Exponentials of scores less `base`; returns their sums, lane by lane. In their place is stored
// `kept(place, exponential)`.
template <class Kept>
inline Floats exponentials(float *scores, int64_t first, int64_t end, float base, const Kept &kept) {
    const Floats base_lanes = splat(base);
    Floats total = zeros();
    for_vectors(first, end, [&](int64_t start, auto count) {
        Floats weights[count];
        unrolled<count>([&](auto i) { weights[i] = load(scores + start + i * LANES) - base_lanes; });
        exponentiate(weights);
        unrolled<count>([&](auto i) {
            const int64_t place = start + i * LANES;
            total = total + weights[i];
            store(scores + place, kept(place, weights[i]));
        });
    });
    return total;
}

// Of a row of a tile; returns their sum, that of all weights, the dropped ones too.
inline float exponentials(const ScoreRow &row, float *scores, float highest) {
    const ZetaCall &call = row.scores.call;
    const float base = highest == -INFINITY ? 0 : highest;
    fill_unseen(row, scores, 0);
    if (call.dropout_p == 0)
        return sum(exponentials(scores, row.first, row.end, base,
                                [](int64_t, Floats weight) { return weight; }));
    const Ints hash = splat_int(static_cast<int32_t>(row_hash(row.scores.sequence, row.position)));
    const Ints threshold = splat_int(static_cast<int32_t>(call.dropout_threshold));
    return sum(exponentials(scores, row.first, row.end, base, [&](int64_t place, Floats weight) {
        return unless(dropped(hash, load_ints(row.tile.hashes + place), threshold), weight);
    }));
}

template <class Operands>
inline void forward_tile(ForwardBlock<Operands> &block, const QueryBlock &queries,
                         const Scores &scores, const PackedHead<Operands> &packed, bool adds) {
    const ZetaCall &call = scores.call;
    const KeyTile &tile = *block.tile;
    const Stairs stairs(scores.sight, queries, tile.first, tile.count);
    Operands::make_scores(block.queries, packed.keys, tile.first, block.scores, block.score_stride,
                          stairs);
    for (int64_t row = 0; row < queries.count; ++row) {
        const ScoreRow score_row(scores, tile, queries.first + row);
        float *to = block.scores + row * block.score_stride;
        const float highest = largest(finish_row(score_row, to));
        if (block.maxima[row] == -INFINITY)
            block.maxima[row] = highest;
        else if (highest > block.maxima[row] + RESCALE_FROM)
            block.rescale(row, highest, round_up(call.value_dim, LANES));
        block.totals[row] += exponentials(score_row, to, block.maxima[row]);
    }
    block.weights.take(block.scores, block.score_stride, queries.count, tile.count);
    Operands::make_outputs(block.weights, packed.values, tile.first, block.sums, block.sum_stride,
                           adds, stairs);
}

// A row of the output.
inline void store_sums(const ZetaCall &call, const float *sums, float factor, void *to) {
    for (int64_t column = 0; column < call.value_dim; column += LANES)
        store_dtype(to, call.dtype, column, load(sums + column) * splat(factor),
                    call.value_dim - column);
}

template <class Operands>
inline void store_block(const ForwardBlock<Operands> &block, const QueryBlock &queries,
                        const Scores &scores) {
    const ZetaCall &call = scores.call;
    HeadRows out = head_rows(call.out, call.dtype, scores.batch, scores.head);
    const int64_t first_row = (scores.batch * call.heads + scores.head) * call.target;
    for (int64_t row = 0; row < queries.count; ++row) {
        const float total = block.totals[row];
        const float factor = total == 0 ? 0 : static_cast<float>(1 / (1 - call.dropout_p)) / total;
        const float *sums = block.sums + row * block.sum_stride;
        void *to = out.at(queries.first + row);
        store_sums(call, sums, factor, to);
        if (!call.lse_BHT) continue;
        call.lse_BHT[first_row + queries.first + row] = log_sum_exp(block.maxima[row], total);
    }
}

template <class Operands>
inline Scores scores_of(const ZetaCall &call, const Sight &sight, const OffsetTable &offsets,
                        int64_t batch, int64_t head) {
    const float factor = Operands::SCALES_QUERIES ? 1 : static_cast<float>(call.scale);
    return Scores(call, sight, offsets, batch, head, factor);
}

template <class Operands>
inline void forward_block(ForwardBlock<Operands> &block, const Scores &scores,
                          const PackedHead<Operands> &packed, int64_t first, int64_t most) {
    const ZetaCall &call = scores.call;
    const QueryBlock queries(scores.sight, first, smaller(most, call.target - first));
    const HeadRows query = head_rows(call.query, call.dtype, scores.batch, scores.head);
    block.queries.copy(query, first, queries.count, static_cast<float>(call.scale));
    bool has_sums = false;
    for (int64_t row = 0; row < queries.count; ++row) {
        block.maxima[row] = -INFINITY;
        block.totals[row] = 0;
    }
    const uint32_t salt = column_salt(call.seed);
    for (int64_t key = round_down(queries.keys.low, Operands::STEP); key < queries.keys.high;
         key += TILE_KEYS) {
        const int64_t count = smaller(TILE_KEYS, queries.keys.high - key);
        if (!queries.look_at(scores.sight, key, count, *block.tile)) continue;
        if (call.dropout_p > 0) block.tile->set_hashes(scores.sight, salt);
        forward_tile(block, queries, scores, packed, has_sums);
        has_sums = true;
    }
    if (!has_sums) clear(block.sums, queries.count * block.sum_stride);
    scores.sight.unseen.look_at(block.sums, queries.count, call.value_dim, block.sum_stride);
    store_block(block, queries, scores);
}

// A task is a key head and all that look at it, or one of `parts` of their queries; it packs for
// itself.
template <class Operands>
inline int64_t forward_by_heads(const ZetaCall &call, Unseen &unseen, const OffsetTable &offsets,
                                int64_t parts) {
    const int64_t group = call.heads / call.key_heads, block_size = queries_of_block(call);
    const int64_t of_part =
        parts == 1 ? call.target : round_up(divide_up(call.target, parts), 4);
    Pieces count(nullptr);
    PackedHead<Operands>::plan(count, call);
    ForwardBlock<Operands>::plan(count, call);
    const int64_t num_tasks = call.batch * call.key_heads * parts;
    const auto work = [&](Pieces &pieces, Tasks &tasks) {
        [[maybe_unused]] const typename Operands::Session session;
        const PackedHead<Operands> packed = PackedHead<Operands>::plan(pieces, call);
        ForwardBlock<Operands> block = ForwardBlock<Operands>::plan(pieces, call);
        for (int64_t task; (task = tasks.take()) >= 0;) {
            const int64_t key_head = task / parts % call.key_heads;
            const int64_t batch = task / parts / call.key_heads;
            const int64_t begin = task % parts * of_part;
            const int64_t end = smaller(begin + of_part, call.target);
            const Sight sight(call, unseen, batch);
            packed.pack(sight, key_head, 0, call.source);
            for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
                const Scores scores = scores_of<Operands>(call, sight, offsets, batch, head);
                for (int64_t first = begin; first < end; first += block_size)
                    forward_block(block, scores, packed, first, smaller(block_size, end - first));
            }
        }
    };
    return run_with_scratch(count.bytes(), num_tasks, call.num_threads, work);
}

// Few key heads: all are packed first, by all threads; then a task is a block of queries.
template <class Operands>
inline int64_t forward_by_blocks(const ZetaCall &call, Unseen &unseen,
                                 const OffsetTable &offsets) {
    const int64_t heads = call.batch * call.key_heads;
    Pieces count(nullptr);
    for (int64_t head = 0; head < heads; ++head) PackedHead<Operands>::plan(count, call);
    Shared shared(count.bytes());
    if (!shared.data()) return ZETA_NO_MEMORY;
    const int64_t head_bytes = count.bytes() / heads;
    const auto packed_head = [&](int64_t head) {
        Pieces pieces(shared.data() + head * head_bytes);
        return PackedHead<Operands>::plan(pieces, call);
    };
    const int64_t parts = divide_up(call.source, TILE_KEYS);
    run(heads * parts, call.num_threads, [&](int64_t task) {
        const int64_t head = task / parts, first = task % parts * TILE_KEYS;
        const Sight sight(call, unseen, head / call.key_heads);
        packed_head(head).pack(sight, head % call.key_heads, first,
                               smaller(TILE_KEYS, call.source - first));
    });
    const int64_t queries = queries_of_block(call);
    const int64_t blocks = divide_up(call.target, queries);
    const int64_t group = call.heads / call.key_heads;
    Pieces block_count(nullptr);
    ForwardBlock<Operands>::plan(block_count, call);
    const int64_t num_tasks = call.batch * call.heads * blocks;
    const auto work = [&](Pieces &pieces, Tasks &tasks) {
        [[maybe_unused]] const typename Operands::Session session;
        ForwardBlock<Operands> block = ForwardBlock<Operands>::plan(pieces, call);
        for (int64_t task; (task = tasks.take()) >= 0;) {
            const int64_t head = task / blocks % call.heads, batch = task / blocks / call.heads;
            const Sight sight(call, unseen, batch);
            const Scores scores = scores_of<Operands>(call, sight, offsets, batch, head);
            // The last blocks first: under a causal mask they are the longest.
            const int64_t first = (blocks - 1 - task % blocks) * queries;
            forward_block(block, scores, packed_head(batch * call.key_heads + head / group), first,
                          queries);
        }
    };
    return run_with_scratch(block_count.bytes(), num_tasks, call.num_threads, work);
}

template <class Operands>
inline int64_t forward_with(const ZetaCall &call) {
    Shared table(call.offsets_HR ? call.heads * OffsetTable::length_of(call) * sizeof(float) : 0);
    OffsetTable offsets{};
    if (call.offsets_HR) {
        if (!table.data()) return ZETA_NO_MEMORY;
        offsets = make_offsets(call, reinterpret_cast<float *>(table.data()));
    }
    const bool has_threads = call.num_threads > 1;
    const bool has_more_tasks = call.target > BLOCK_QUERIES || call.heads > call.key_heads;
    return run_without_unseen(call, [&](Unseen &unseen) {
        if (has_threads && has_more_tasks && call.batch * call.key_heads < 4 * call.num_threads)
            return forward_by_blocks<Operands>(call, unseen, offsets);
        return forward_by_heads<Operands>(call, unseen, offsets, has_threads && is_shared(call) ? 2 : 1);
    });
}
