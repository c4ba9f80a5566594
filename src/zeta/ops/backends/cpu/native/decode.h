// Few queries over many keys, as in generation: all query heads of a key head go together, keys and
// values are read once where they lie, and long sequences are cut so that all threads have work.
//
// The cuts depend on the call's sizes alone, so that no result depends on the number of threads.

constexpr int64_t WANTED_TASKS = 64;
constexpr int64_t LEAST_KEYS = 256;     // of a part
constexpr int64_t ALONE_BYTES = 1 << 17;  // as much as one thread reads before others wake up
constexpr int64_t FAR_BYTES = 1 << 20;    // as many keys are not in the caches that cores have to themselves

// Of so many bytes that so many rows meet. Eight rows take about as long as it takes to read them.
inline bool is_for_one_thread(int64_t bytes, int64_t rows) {
    return bytes * larger(1, rows / 8) < ALONE_BYTES;
}

// How a call is cut.
struct DecodePlan {
    int64_t group, rows, padded_rows, parts;
    int64_t query_stride, weight_stride, sum_stride;

    explicit DecodePlan(const ZetaCall &call)
        : group(call.heads / call.key_heads),
          rows(group * call.target),
          padded_rows(round_up(rows, BLOCK)),
          // Rows apart by an odd number of vectors do not meet in the same banks of the cache.
          query_stride(round_up(call.head_dim, PAIR) + LANES),
          weight_stride(TILE_KEYS + LANES),
          sum_stride(round_up(call.value_dim, PAIR)) {
        const int64_t heads = call.batch * call.key_heads;
        const int64_t most = divide_up(call.source, LEAST_KEYS);
        parts = larger(1, smaller(most, divide_up(WANTED_TASKS, heads)));
    }
};

// The rows of a key head under way.
struct DecodeBlock {
    float *queries, *weights, *near;
    float *sums, *maxima, *totals;
    KeyTile *tile;

    static DecodeBlock plan(Pieces &pieces, const DecodePlan &plan) {
        DecodeBlock block = of_sums(pieces, plan);
        block.queries = pieces.take<float>(plan.padded_rows * plan.query_stride);
        block.weights = pieces.take<float>(plan.padded_rows * plan.weight_stride);
        block.near = pieces.take<float>(NEAR_FLOATS);
        block.tile = pieces.take<KeyTile>(1);
        return block;
    }

    // What is left of a part when it is done.
    static DecodeBlock of_sums(Pieces &pieces, const DecodePlan &plan) {
        DecodeBlock block{};
        block.sums = pieces.take<float>(plan.padded_rows * plan.sum_stride);
        block.maxima = pieces.take<float>(plan.rows);
        block.totals = pieces.take<float>(plan.rows);
        return block;
    }
};

// Where the rows of one key head lie: in one place, or in pages.
template <class T>
struct HeadCache {
    const T *data;
    int64_t row, page, page_size;
    const int32_t *pages;
    bool is_far;

    HeadCache(const ZetaCall &call, const ZetaRows &rows, int64_t batch, int64_t key_head)
        : data(static_cast<const T *>(rows.data) + key_head * rows.head),
          row(rows.row),
          page(rows.batch),
          page_size(call.page_table ? call.page_size : INT64_MAX),
          pages(call.page_table ? call.page_table + batch * call.pages_per_row : nullptr),
          is_far(is_asking_worth_it() &&
                 call.batch * call.key_heads * call.source * call.head_dim *
                         static_cast<int64_t>(sizeof(T)) >= FAR_BYTES) {
        if (!pages) data += batch * rows.batch;
    }

    Stream<T> stream(int64_t first, int64_t count) const {
        const T *from = pages ? data + pages[first / page_size] * page : data;
        return {from + (pages ? first % page_size : first) * row, row, count, is_far};
    }
};

// Calls `body(first, count)` for runs of keys that there are and that lie in one page.
template <class Body>
inline void for_runs(const Sight &sight, int64_t key_head, int64_t page_size, int64_t first,
                     int64_t end, const Body &body) {
    const bool has_all = sight.has_all(first, end - first);
    while (first < end) {
        int64_t last = smaller(end, page_size == INT64_MAX
                                        ? end : round_down(first, page_size) + page_size);
        if (!has_all) {
            while (first < last && !sight.has(first, key_head)) ++first;
            int64_t stop = first;
            while (stop < last && sight.has(stop, key_head)) ++stop;
            last = stop;
        }
        if (last > first) body(first, last - first);
        first = larger(last, first);
    }
}

// The factors of int8 keys or values, from the first key of a tile; null where there are none.
inline const float *tile_factors(const ZetaCall &call, const float *factors, int64_t batch,
                                 int64_t key_head, int64_t first) {
    if (!factors) return nullptr;
    return factors + batch * call.factor_batch + key_head * call.factor_head + first;
}

inline void multiply_row(float *row, const float *factors, int64_t count) {
    for (int64_t key = 0; key < count; key += LANES) {
        const Floats factor = load_first(factors + key, count - key);
        store_first(row + key, load(row + key) * factor, count - key);
    }
}

// How rows of Q meet keys and values of K.
template <class Q, class K>
struct RowProducts : WideRows<Q, K> {};
#if defined(ZETA_HAS_PAIRS)
template <>
struct RowProducts<BFloat16, BFloat16> : PairedRows {};
#endif

// One part of the keys of one key head. Q is the dtype of the queries, K that of the cache.
template <class Q, class K>
struct DecodePart {
    using Products = RowProducts<Q, K>;
    using Number = typename Products::Number;
    static constexpr int64_t NUMBERS = sizeof(float) / sizeof(Number);  // in the place of a float

    const ZetaCall &call;
    const DecodePlan &plan;
    const DecodeBlock &block;
    const OffsetTable &offsets;
    const int64_t batch, key_head;
    const Sight sight;
    const HeadCache<K> keys, values;

    DecodePart(const ZetaCall &call, Unseen &unseen, const DecodePlan &plan,
               const DecodeBlock &block, const OffsetTable &offsets, int64_t batch,
               int64_t key_head)
        : call(call),
          plan(plan),
          block(block),
          offsets(offsets),
          batch(batch),
          key_head(key_head),
          sight(call, unseen, batch),
          keys(call, call.key, batch, key_head),
          values(call, call.value, batch, key_head) {}

    int64_t head_of(int64_t row) const { return key_head * plan.group + row / call.target; }

    void run(int64_t part) const {
        const QueryBlock queries(sight, 0, call.target);
        start();
        const int64_t length = larger(0, queries.keys.high - queries.keys.low);
        const int64_t step = round_up((length + plan.parts - 1) / plan.parts, 16);
        const int64_t first = queries.keys.low + part * step;
        const int64_t end = smaller(first + step, queries.keys.high);
        for (int64_t key = first; key < end; key += TILE_KEYS) {
            if (queries.look_at(sight, key, smaller(TILE_KEYS, end - key), *block.tile)) add_tile();
        }
        sight.unseen.look_at(block.sums, plan.rows, plan.sum_stride, plan.sum_stride);
    }

    Number *query(int64_t row) const {
        return reinterpret_cast<Number *>(block.queries + row * plan.query_stride);
    }

    void start() const {
        const float factor = static_cast<float>(call.scale);
        for (int64_t row = 0; row < plan.rows; ++row) {
            const Q *from = static_cast<const Q *>(call.query.data) + batch * call.query.batch +
                            head_of(row) * call.query.head + row % call.target * call.query.row;
            Products::take_query(from, call.head_dim, factor, query(row));
            block.maxima[row] = -INFINITY;
            block.totals[row] = 0;
        }
        clear(block.queries + plan.rows * plan.query_stride,
              (plan.padded_rows - plan.rows) * plan.query_stride);
        clear(block.sums, plan.padded_rows * plan.sum_stride);
    }

    void add_tile() const {
        KeyTile &tile = *block.tile;
        if (call.dropout_p > 0) tile.set_hashes(sight, column_salt(call.seed));
        const auto for_tile = [&](const auto &body) {
            for_runs(sight, key_head, keys.page_size, tile.first, tile.first + tile.count, body);
        };
        for_tile([&](int64_t first, int64_t count) {
            Products::score(query(0), plan.query_stride * NUMBERS, plan.rows,
                            keys.stream(first, count), call.head_dim,
                            block.weights + first - tile.first, plan.weight_stride, block.near);
        });
        for (int64_t head = 0; head < plan.group; ++head) weigh_head(head);
        const Number *weights = reinterpret_cast<const Number *>(block.weights);
        for_tile([&](int64_t first, int64_t count) {
            Products::add(weights + first - tile.first, plan.weight_stride * NUMBERS, plan.rows,
                          values.stream(first, count), call.value_dim, block.sums,
                          plan.sum_stride, block.near);
        });
    }

    // From products to weights, of one head of the group.
    void weigh_head(int64_t head) const {
        const KeyTile &tile = *block.tile;
        const float factor = Products::SCALES_QUERIES ? 1 : static_cast<float>(call.scale);
        const Scores scores(call, sight, offsets, batch, key_head * plan.group + head, factor);
        const float *of_keys = tile_factors(call, call.key_factor_BGS, batch, key_head, tile.first);
        const float *of_values =
            tile_factors(call, call.value_factor_BGS, batch, key_head, tile.first);
        for (int64_t query = 0; query < call.target; ++query) {
            const int64_t row = head * call.target + query;
            float *weights = block.weights + row * plan.weight_stride;
            const ScoreRow score_row(scores, tile, query);
            if (of_keys) multiply_row(weights, of_keys, tile.count);
            const float highest = largest(finish_row(score_row, weights));
            if (block.maxima[row] == -INFINITY)
                block.maxima[row] = highest;
            else if (highest > block.maxima[row] + RESCALE_FROM)
                rescale_sums(row, highest);
            block.totals[row] += exponentials(score_row, weights, block.maxima[row]);
            if (of_values) multiply_row(weights, of_values, tile.count);
            Products::take_weights(weights, tile.count);
        }
    }

    void rescale_sums(int64_t row, float highest) const {
        const float factor = exponential(block.maxima[row] - highest);
        block.maxima[row] = highest;
        block.totals[row] *= factor;
        scale_row(block.sums + row * plan.sum_stride, plan.sum_stride, factor);
    }

    void finish() const {
        for (int64_t row = 0; row < plan.rows; ++row) {
            const int64_t head = head_of(row), query = row % call.target;
            const float total = block.totals[row];
            const float kept = static_cast<float>(1 / (1 - call.dropout_p));
            Q *to = static_cast<Q *>(call.out.data) + batch * call.out.batch +
                    head * call.out.head + query * call.out.row;
            Products::store(block.sums + row * plan.sum_stride, call.value_dim,
                            total == 0 ? 0 : kept / total, to);
            if (!call.lse_BHT) continue;
            call.lse_BHT[(batch * call.heads + head) * call.target + query] =
                log_sum_exp(block.maxima[row], total);
        }
    }
};

// Of all parts of a key head, in their order.
inline void merge_parts(const DecodePlan &plan, const DecodeBlock *parts, const DecodeBlock &to) {
    for (int64_t row = 0; row < plan.rows; ++row) {
        float highest = -INFINITY;
        for (int64_t part = 0; part < plan.parts; ++part)
            highest = parts[part].maxima[row] > highest ? parts[part].maxima[row] : highest;
        float *sums = to.sums + row * plan.sum_stride;
        clear(sums, plan.sum_stride);
        to.maxima[row] = highest;
        to.totals[row] = 0;
        for (int64_t part = 0; part < plan.parts; ++part) {
            const float factor =
                exponential(parts[part].maxima[row] - (highest == -INFINITY ? 0 : highest));
            const float *from = parts[part].sums + row * plan.sum_stride;
            to.totals[row] += parts[part].totals[row] * factor;
            for (int64_t column = 0; column < plan.sum_stride; column += LANES)
                store(sums + column,
                      fma(load(from + column), splat(factor), load(sums + column)));
        }
    }
}

// What the threads of a call share: the offsets, how many parts of a head are left, the parts.
struct DecodeShared {
    float *offsets;
    int32_t *left;
    DecodeBlock parts[WANTED_TASKS];  // of the first key head
    int64_t head_bytes;

    static DecodeShared plan(Pieces &pieces, const ZetaCall &call, const DecodePlan &plan) {
        DecodeShared shared{};
        const int64_t heads = call.batch * call.key_heads;
        if (call.offsets_HR)
            shared.offsets = pieces.take<float>(call.heads * OffsetTable::length_of(call));
        if (plan.parts == 1) return shared;
        shared.left = pieces.take<int32_t>(heads);
        const int64_t before = pieces.bytes();
        for (int64_t part = 0; part < plan.parts; ++part)
            shared.parts[part] = DecodeBlock::of_sums(pieces, plan);
        shared.head_bytes = pieces.bytes() - before;
        pieces.take<char>((heads - 1) * shared.head_bytes);
        return shared;
    }

    DecodeBlock part_of(int64_t head, int64_t part) const {
        const int64_t floats = head * head_bytes / static_cast<int64_t>(sizeof(float));
        DecodeBlock block = parts[part];
        block.sums += floats;
        block.maxima += floats;
        block.totals += floats;
        return block;
    }
};

template <class Q, class K>
inline void decode_task(const ZetaCall &call, Unseen &unseen, const DecodePlan &plan,
                        const DecodeBlock &block, const DecodeShared &shared,
                        const OffsetTable &offsets, int64_t task) {
    const int64_t head = task / plan.parts, part = task % plan.parts;
    DecodeBlock mine = block;
    if (plan.parts > 1) {
        const DecodeBlock kept = shared.part_of(head, part);
        mine.sums = kept.sums;
        mine.maxima = kept.maxima;
        mine.totals = kept.totals;
    }
    const int64_t batch = head / call.key_heads, key_head = head % call.key_heads;
    const DecodePart<Q, K> work(call, unseen, plan, mine, offsets, batch, key_head);
    work.run(part);
    if (plan.parts == 1) return work.finish();
    // Whoever is last puts the parts together.
    if (__atomic_sub_fetch(shared.left + head, 1, __ATOMIC_ACQ_REL)) return;
    DecodeBlock parts[WANTED_TASKS];
    for (int64_t other = 0; other < plan.parts; ++other) parts[other] = shared.part_of(head, other);
    merge_parts(plan, parts, block);
    DecodePart<Q, K>(call, unseen, plan, block, offsets, batch, key_head).finish();
}

template <class Q, class K>
inline int64_t decode_in(const ZetaCall &call, Unseen &unseen) {
    const DecodePlan plan(call);
    Pieces block_count(nullptr), shared_count(nullptr);
    DecodeBlock::plan(block_count, plan);
    DecodeShared::plan(shared_count, call, plan);
    Shared memory(shared_count.bytes());
    if (shared_count.bytes() && !memory.data()) return ZETA_NO_MEMORY;
    Pieces shared_pieces(memory.data());
    const DecodeShared shared = DecodeShared::plan(shared_pieces, call, plan);
    const int64_t heads = call.batch * call.key_heads;
    for (int64_t head = 0; plan.parts > 1 && head < heads; ++head)
        shared.left[head] = static_cast<int32_t>(plan.parts);
    OffsetTable offsets{};
    if (call.offsets_HR)
        offsets = make_offsets(call, shared.offsets);
    const int64_t row_bytes = (call.head_dim + call.value_dim) * static_cast<int64_t>(sizeof(K));
    const bool is_small = is_for_one_thread(heads * call.source * row_bytes, plan.rows);
    const auto work = [&](Pieces &pieces, Tasks &tasks) {
        const DecodeBlock block = DecodeBlock::plan(pieces, plan);
        for (int64_t task; (task = tasks.take()) >= 0;)
            decode_task<Q, K>(call, unseen, plan, block, shared, offsets, task);
    };
    return run_with_scratch(block_count.bytes(), heads * plan.parts,
                            is_small ? 1 : call.num_threads, work);
}

// Q is the dtype of the call, K that of its keys and values.
template <class Q, class K>
inline int64_t decode_with(const ZetaCall &call) {
    return run_without_unseen(
        call, [&](Unseen &unseen) { return decode_in<Q, K>(call, unseen); });
}
