// What is known of each row of scores before its tiles are gone through, made once for all key blocks.

// A weight is exp(score - base) x norm; the gradient of a score is weight x (gradient of weight - delta),
// where delta is the sum over keys of weight x gradient, less the gradient of lse.
//
// A row that lies in its tile as a whole finds norm and that sum anew: as exact as they can be, where
// those from outside are rounded. Its norm is 0, and its delta less the gradient of lse alone.
struct RowSums {
    float base, norm, delta;
};

// The base is lse, and the norm 1, as long as lse has digits enough behind the point. From here on its
// rounding alone makes weights wrong by more than 3e-5, and -1e9 has no place for the log of a number of
// keys at all; nor are products rounded as those of the forward pass were. So a far row is normalised
// anew, by the products that its gradients are made of: its base is its largest score.
constexpr float FAR = 1024;

// Of an lse; a row without a visible key is none.
inline bool is_far(float base) { return fabsf(base) >= FAR && base != INFINITY; }

inline RowSums begin_sums(const ZetaCall &call, int64_t row, float norm) {
    const float lse = call.lse_BHT[row];
    // Without a visible key, subtracting +infinity makes the weights 0.
    const float base = lse == -INFINITY ? INFINITY : lse;
    return {base, norm, call.grad_lse_BHT ? -call.grad_lse_BHT[row] : 0};
}

// A row of the gradient of weights, as that of the kernels' own weights.
inline void load_weight_gradients(const Scores &scores, int64_t query, const KeyTile &tile,
                                  float *to) {
    const ZetaCall &call = scores.call;
    const int64_t plane =
        call.mean_weights ? scores.batch : scores.batch * call.heads + scores.head;
    const int64_t start = (plane * call.target + query) * call.source + tile.first;
    const float factor = call.mean_weights ? 1.0f / call.heads : 1;
    for (int64_t key = 0; key < tile.count; key += LANES)
        store(to + key,
              load_dtype(call.grad_weights, call.dtype, start + key, tile.count - key) *
                  splat(factor));
}

// Whether delta is made of the weights themselves: half precision rounds the output, and the gradient of
// a bias of all offsets, as learned slopes make one, goes into sums with distances for factors. What is
// wrong with a row's delta they make larger as many times.
inline bool needs_exact_delta(const ZetaCall &call) {
    const bool reaches_all = call.reach + 1 >= larger(call.source, call.target);
    return call.grad_offsets_HR && call.dtype != ZETA_FLOAT32 && reaches_all;
}

// The sum over keys of weight x gradient, from the output.
inline float row_delta(const ZetaCall &call, int64_t batch, int64_t head, int64_t query) {
    const void *out = head_rows(call.out, call.dtype, batch, head).at(query);
    const void *grad = head_rows(call.grad_out, call.dtype, batch, head).at(query);
    Floats total = zeros();
    for (int64_t column = 0; column < call.value_dim; column += LANES) {
        const int64_t count = call.value_dim - column;
        total = fma(load_dtype(out, call.dtype, column, count),
                    load_dtype(grad, call.dtype, column, count), total);
    }
    return sum(total);
}

// A block of queries goes over its keys a first time: for far rows, for the gradient of weights, and for
// an exact delta.
template <class Operands>
struct EarlyPass {
    typename Operands::Rows queries, grad_out;
    typename Operands::Columns keys, values;
    float *scores, *grads;
    KeyTile *tile;
    int64_t stride;

    static EarlyPass plan(Pieces &pieces, const ZetaCall &call) {
        EarlyPass found;
        found.stride = row_stride(TILE_KEYS);
        found.queries = Operands::Rows::plan(pieces, BLOCK_QUERIES, call.head_dim, false);
        found.keys = Operands::Columns::plan(pieces, TILE_KEYS, call.head_dim);
        found.scores = pieces.take<float>(BLOCK_QUERIES * found.stride);
        const bool has_products = !call.grad_weights && needs_exact_delta(call);
        const int64_t width = has_products ? call.value_dim : 0;
        found.grad_out = Operands::Rows::plan(pieces, BLOCK_QUERIES, width, false);
        found.values = Operands::Columns::plan(pieces, TILE_KEYS, width);
        found.grads = pieces.take<float>((has_products ? BLOCK_QUERIES : 1) * found.stride);
        found.tile = pieces.take<KeyTile>(1);
        return found;
    }

    void normalise_far(const Scores &of, const QueryBlock &block, RowSums *sums) const {
        bool far[BLOCK_QUERIES], has_far = false;
        for (int64_t row = 0; row < block.count; ++row) {
            far[row] = is_far(sums[row].base);
            if (far[row]) sums[row].base = -INFINITY, sums[row].norm = 0;
            has_far = has_far || far[row];
        }
        if (!has_far) return;
        for_rows(of, block, [&](int64_t row, const ScoreRow &score_row, float *products) {
            if (!far[row]) return;
            RowSums &to = sums[row];
            const float highest =
                largest(max(finish_row(score_row, products), splat(to.base)));
            if (highest == -INFINITY) return;
            Floats total = zeros();
            for (int64_t key = 0; key < tile->padded; key += LANES)
                total = total + exp(load(products + key) - splat(highest));
            to.norm = to.norm * exponential(to.base - highest) + sum(total);
            to.base = highest;
        });
        for (int64_t row = 0; row < block.count; ++row)
            if (far[row]) sums[row].norm = 1 / sums[row].norm;
    }

    void add_weight_gradients(const Scores &of, const QueryBlock &block, RowSums *sums) const {
        for_rows(of, block, [&](int64_t row, const ScoreRow &score_row, float *products) {
            load_weight_gradients(of, block.first + row, *tile, grads);
            sums[row].delta += sum_products(score_row, products, grads, sums[row]);
        });
    }

    void add_output_gradients(const Scores &of, const QueryBlock &block, RowSums *sums) const {
        const ZetaCall &call = of.call;
        const HeadRows grad = head_rows(call.grad_out, call.dtype, of.batch, of.head);
        const KeyRows value = values_of(of.sight, of.head / (call.heads / call.key_heads));
        grad_out.copy(grad, block.first, block.count, 1);
        const auto begin = [&](const Stairs &stairs) {
            values.pack(value, tile->first, tile->count, 0);
            Operands::make_scores(grad_out, values, 0, grads, stride, stairs);
            if (call.dropout_p > 0) tile->set_hashes(of.sight, column_salt(call.seed));
        };
        for_tiles(of, block, begin, [&](int64_t row, const ScoreRow &score_row, float *products) {
            float *of_row = grads + row * stride;
            if (call.dropout_p > 0) drop_gradients(score_row, of_row);
            sums[row].delta += sum_products(score_row, products, of_row, sums[row]);
        });
    }

  private:
    // The sum over a tile's keys of weight x gradient.
    static float sum_products(const ScoreRow &row, float *products, const float *gradients,
                              const RowSums &sums) {
        if (row.is_hidden || sums.base == INFINITY) return 0;
        finish_row(row, products);
        const Floats base = splat(sums.base);
        const int64_t end = row.end;
        Floats total = zeros();
        for (int64_t key = row.first; key < end; key += LANES)
            total = fma(exp(load(products + key) - base), load(gradients + key), total);
        return sum(total) * sums.norm;
    }

    // Gradients of weights before dropout, of those after it.
    static void drop_gradients(const ScoreRow &row, float *gradients) {
        const ZetaCall &call = row.scores.call;
        const Ints hash =
            splat_int(static_cast<int32_t>(row_hash(row.scores.sequence, row.position)));
        const Ints threshold = splat_int(static_cast<int32_t>(call.dropout_threshold));
        const Floats factor = splat(static_cast<float>(1 / (1 - call.dropout_p)));
        for (int64_t key = 0; key < row.tile.padded; key += LANES) {
            const Mask drop = dropped(hash, load_ints(row.tile.hashes + key), threshold);
            store(gradients + key, unless(drop, load(gradients + key) * factor));
        }
    }

    template <class Body>
    void for_rows(const Scores &of, const QueryBlock &block, const Body &body) const {
        for_tiles(of, block, [](const Stairs &) {}, body);
    }

    // Of each tile that the queries may see something of calls `begin(stairs)`, then, for each row,
    // `body(row, score_row, products)`.
    template <class Begin, class Body>
    void for_tiles(const Scores &of, const QueryBlock &block, const Begin &begin,
                   const Body &body) const {
        const ZetaCall &call = of.call;
        const HeadRows query = head_rows(call.query, call.dtype, of.batch, of.head);
        const int64_t key_head = of.head / (call.heads / call.key_heads);
        const KeyRows key = keys_of(of.sight, key_head);
        queries.copy(query, block.first, block.count, static_cast<float>(call.scale));
        for (int64_t first = round_down(block.keys.low, Operands::STEP); first < block.keys.high;
             first += TILE_KEYS) {
            const int64_t count = smaller(TILE_KEYS, block.keys.high - first);
            if (!block.look_at(of.sight, first, count, *tile)) continue;
            keys.pack(key, first, count, 0);
            const Stairs stairs(of.sight, block, first, count);
            Operands::make_scores(queries, keys, 0, scores, stride, stairs);
            begin(stairs);
            for (int64_t row = 0; row < block.count; ++row)
                body(row, ScoreRow(of, *tile, block.first + row), scores + row * stride);
        }
    }
};

template <class Operands>
inline void make_sums(const Scores &scores, const EarlyPass<Operands> &pass, int64_t first,
                      RowSums *sums_BHT) {
    const ZetaCall &call = scores.call;
    const QueryBlock block(scores.sight, first, smaller(BLOCK_QUERIES, call.target - first));
    const int64_t row0 = (scores.batch * call.heads + scores.head) * call.target + first;
    RowSums *sums = sums_BHT + row0;
    const bool is_exact = needs_exact_delta(call);
    for (int64_t row = 0; row < block.count; ++row) {
        sums[row] = begin_sums(call, row0 + row, 1);
        if (!call.grad_weights && !is_exact)
            sums[row].delta += row_delta(call, scores.batch, scores.head, first + row);
    }
    pass.normalise_far(scores, block, sums);
    if (call.grad_weights)
        pass.add_weight_gradients(scores, block, sums);
    else if (is_exact)
        pass.add_output_gradients(scores, block, sums);
}
