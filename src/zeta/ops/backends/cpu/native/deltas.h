// What every row of the scores' gradient is short of: sum over keys of weight x gradient, less the
// gradient of lse. Made once for all key blocks.

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

// A row without a visible key has an lse of -infinity: subtracting +infinity makes its weights 0.
inline float row_lse(const ZetaCall &call, int64_t row) {
    const float lse = call.lse_BHT[row];
    return lse == -INFINITY ? INFINITY : lse;
}

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

// For the gradient of weights, the weights are made here a first time.
template <class Operands>
struct WeightDeltas {
    typename Operands::Rows queries;
    typename Operands::Columns keys;
    float *weights, *grads;
    KeyTile *tile;
    int64_t weight_stride;

    static WeightDeltas plan(Pieces &pieces, const ZetaCall &call) {
        WeightDeltas found;
        found.weight_stride = row_stride(TILE_KEYS);
        found.queries = Operands::Rows::plan(pieces, BLOCK_QUERIES, call.head_dim, false);
        found.keys = Operands::Columns::plan(pieces, TILE_KEYS, call.head_dim);
        found.weights = pieces.take<float>(BLOCK_QUERIES * found.weight_stride);
        found.grads = pieces.take<float>(TILE_KEYS);
        found.tile = pieces.take<KeyTile>(1);
        return found;
    }

    void add(const Scores &scores, const QueryBlock &block, float *deltas) const {
        const ZetaCall &call = scores.call;
        const HeadRows query = head_rows(call.query, call.dtype, scores.batch, scores.head);
        const int64_t key_head = scores.head / (call.heads / call.key_heads);
        const HeadRows key = head_rows(call.key, call.dtype, scores.batch, key_head);
        queries.copy(query, block.first, block.count, static_cast<float>(call.scale));
        for (int64_t first = round_down(block.keys.low, Operands::STEP); first < block.keys.high;
             first += TILE_KEYS) {
            tile->set(scores.sight, first, smaller(TILE_KEYS, block.keys.high - first));
            if (!block.sees(scores.sight, *tile)) continue;
            keys.pack(key, scores.sight.existing, first, tile->count, 0);
            Operands::make_scores(queries, block.count, keys, 0, tile->count, weights,
                                  weight_stride);
            for (int64_t row = 0; row < block.count; ++row)
                deltas[row] += row_sum(scores, block.first + row, weights + row * weight_stride);
        }
    }

  private:
    float row_sum(const Scores &scores, int64_t query, float *products) const {
        const ZetaCall &call = scores.call;
        finish_row(ScoreRow(scores, *tile, query), products);
        load_weight_gradients(scores, query, *tile, grads);
        const int64_t row = (scores.batch * call.heads + scores.head) * call.target + query;
        const Floats lse = splat(row_lse(call, row));
        Floats total = zeros();
        for (int64_t key = 0; key < tile->padded; key += LANES)
            total = fma(exp(load(products + key) - lse), load(grads + key), total);
        return sum(total);
    }
};

template <class Operands>
inline void make_deltas(const Scores &scores, const WeightDeltas<Operands> &scratch, int64_t first,
                        float *deltas_BHT) {
    const ZetaCall &call = scores.call;
    const QueryBlock block(scores.sight, first, smaller(BLOCK_QUERIES, call.target - first));
    const int64_t row0 = (scores.batch * call.heads + scores.head) * call.target + first;
    for (int64_t row = 0; row < block.count; ++row)
        deltas_BHT[row0 + row] =
            call.grad_weights ? 0 : row_delta(call, scores.batch, scores.head, first + row);
    if (call.grad_weights) scratch.add(scores, block, deltas_BHT + row0);
    if (!call.grad_lse_BHT) return;
    for (int64_t row = 0; row < block.count; ++row)
        deltas_BHT[row0 + row] -= call.grad_lse_BHT[row0 + row];
}

// Where the tasks find the rest by themselves.
inline void make_lse_deltas(const ZetaCall &call, float *deltas_BHT) {
    for (int64_t row = 0; row < call.batch * call.heads * call.target; ++row)
        deltas_BHT[row] = call.grad_lse_BHT ? -call.grad_lse_BHT[row] : 0;
}
