// A row of the scores' gradient, from a row of products.

template <RowKind KIND>
inline float largest_score(const ScoreRow &row, const float *products) {
    Floats highest = splat(-INFINITY), unused = zeros();
    for (int64_t key = row.first; key < row.end; key += LANES)
        highest = max(highest, row.finish<KIND>(load(products + key), key, unused));
    return largest(highest);
}

// From products to weights and gradients of scores: `weights` holds q . k and becomes what the
// values were multiplied with, `grads` holds the gradient of that and becomes the gradient of
// q . k, `biased` gets that of the biases. TWICE: the row has a norm, or finds it first.
template <RowKind KIND, bool DROPS, bool TWICE>
inline void backward_row(const ScoreRow &row, RowSums sums, float *weights, float *grads,
                         float *biased) {
    const ZetaCall &call = row.scores.call;
    constexpr bool HAS_SLOPE = KIND == RowKind::GENERAL;
    const Ints hash =
        splat_int(static_cast<int32_t>(DROPS ? row_hash(row.scores.sequence, row.position) : 0));
    const Ints threshold = splat_int(static_cast<int32_t>(call.dropout_threshold));
    const Floats factor = splat(static_cast<float>(1 / (1 - call.dropout_p)));
    const bool is_whole = sums.norm == 0;
    const Floats base = splat(TWICE && is_whole && is_far(sums.base)
                                  ? largest_score<KIND>(row, weights)
                                  : sums.base);
    alignas(64) float slopes[TWICE && HAS_SLOPE ? TILE_KEYS : LANES];
    // A dropped weight is passed on with a minus sign. Of 0 and NaN `max` gives the second.
    const auto finish = [&](int64_t key, Floats weight, Floats grad, Floats slope, Floats delta) {
        const Floats kept = DROPS ? max(zeros(), weight) * factor : weight;
        const Floats grad_score = (DROPS ? abs(weight) : weight) * (grad - delta);
        store(weights + key, kept);
        // One after the other: they may be the same place.
        if (HAS_SLOPE) store(biased + key, grad_score);
        store(grads + key, HAS_SLOPE ? grad_score * slope : grad_score);
    };
    const int64_t first = row.first, end = row.end;
    fill_unseen(row, weights, 0);
    fill_unseen(row, grads, 0);
    if (HAS_SLOPE) fill_unseen(row, biased, 0);
    Floats total = zeros(), product = zeros();
    // The general case has code enough for one.
    for_vectors<HAS_SLOPE ? 1 : SEVERAL>(first, end, [&](int64_t start, auto count) {
        Floats slope[count], weight[count];
        unrolled<count>([&](auto i) {
            const int64_t key = start + i * LANES;
            slope[i] = splat(1.0f);
            weight[i] = row.template finish<KIND>(load(weights + key), key, slope[i]) - base;
        });
        exponentiate(weight);
        unrolled<count>([&](auto i) {
            const int64_t key = start + i * LANES;
            Floats grad = load(grads + key);
            if (TWICE) total = total + weight[i];
            if (DROPS) {
                const Mask drop = dropped(hash, load_ints(row.tile.hashes + key), threshold);
                grad = unless(drop, grad * factor);
                if (TWICE) product = fma(weight[i], grad, product);
                weight[i] = select(drop, splat(-0.0f) - weight[i], weight[i]);
            } else if (TWICE) {
                product = fma(weight[i], grad, product);
            }
            if (!TWICE) {
                finish(key, weight[i], grad, slope[i], splat(sums.delta));
                return;
            }
            store(weights + key, weight[i]);
            store(grads + key, grad);
            if (HAS_SLOPE) store(slopes + key, slope[i]);
        });
    });
    if (!TWICE) return;
    const float norm = is_whole ? 1 / sum(total) : sums.norm;
    const Floats delta = splat(is_whole ? sum(product) * norm + sums.delta : sums.delta);
    for (int64_t key = first; key < end; key += LANES)
        finish(key, load(weights + key) * splat(norm), load(grads + key),
               HAS_SLOPE ? load(slopes + key) : splat(1.0f), delta);
}

template <RowKind KIND>
inline void backward_row_of(const ScoreRow &row, RowSums sums, float *weights, float *grads,
                            float *biased) {
    const bool drops = row.scores.call.dropout_p > 0;
    const auto pass = sums.norm == 1 ? drops ? backward_row<KIND, true, false>
                                             : backward_row<KIND, false, false>
                      : drops        ? backward_row<KIND, true, true>
                                     : backward_row<KIND, false, true>;
    pass(row, sums, weights, grads, biased);
}

inline void backward_row(const ScoreRow &row, RowSums sums, float *weights, float *grads,
                         float *biased) {
    if (row.is_hidden || sums.base == INFINITY) {
        clear(weights, row.tile.padded);
        clear(grads, row.tile.padded);
        clear(biased, row.tile.padded);
        return;
    }
    switch (row.kind()) {
        case RowKind::PLAIN:
            return backward_row_of<RowKind::PLAIN>(row, sums, weights, grads, biased);
        case RowKind::OFFSETS:
            return backward_row_of<RowKind::OFFSETS>(row, sums, weights, grads, biased);
        default: return backward_row_of<RowKind::GENERAL>(row, sums, weights, grads, biased);
    }
}
