// Operands of a few queries: keys and values are multiplied as they lie, where to bring them across
// would take most of the time.

constexpr int64_t FEW = 16;             // queries of as few keys
constexpr int64_t FEW_QUERIES = BLOCK;  // of any number of keys

// For the gradient of an output, not of weights: large scores have few digits behind the point, and
// must be rounded as they were, by zeta_decode and by zeta_weights.
inline bool are_few(const ZetaCall &call) {
    const bool has_few_keys = call.source <= FEW && call.target <= FEW;
    return (has_few_keys || call.target <= FEW_QUERIES) && !call.grad_weights;
}

struct FewOperands : FmaOperands {
    // Keys or values, one after the other: where they lie, or copied.
    struct Lines {
        float *copies;
        Stream<float> *lines;
        int64_t width, stride;

        static Lines plan(Pieces &pieces, int64_t length, int64_t width) {
            const int64_t stride = row_stride(width);
            return {pieces.take<float>(round_up(length, LANES) * stride),
                    pieces.take<Stream<float>>(1), width, stride};
        }

        // To the place 0: the backward pass packs its keys, or values, all at once.
        void pack(const KeyRows &rows, int64_t first, int64_t count, int64_t) const {
            if (rows.rows.dtype == ZETA_FLOAT32 && rows.sight.has_all(first, count)) {
                *lines = {static_cast<const float *>(rows.rows.at(first)), rows.rows.row, count,
                          count > FEW && is_asking_worth_it()};
                return;
            }
            *lines = {copies, stride, count};
            copy_keys(rows, first, count, [&](int64_t key, int64_t feature) {
                return copies + key * stride + feature;
            });
        }
    };
    using Columns = Lines;
    using Values = Lines;

    static void make_scores(const Rows &rows, const Columns &columns, int64_t place, float *scores,
                            int64_t stride, const Stairs &stairs) {
        for (int64_t row = 0; row < stairs.queries; ++row)
            fill(scores + row * stride, 0, stairs.keys, 0);
        score_keys(rows.data, rows.stride, stairs.queries, columns.lines->part(place, stairs.keys),
                   columns.width, scores, stride, nullptr);
    }

    static void make_outputs(const Weights &weights, const Values &values, int64_t place,
                             float *outputs, int64_t stride, bool adds, const Stairs &stairs) {
        if (!adds) clear(outputs, stairs.queries * stride);
        add_values(weights.data, weights.stride, stairs.queries,
                   values.lines->part(place, stairs.keys), values.width, outputs, stride, nullptr);
    }
};
