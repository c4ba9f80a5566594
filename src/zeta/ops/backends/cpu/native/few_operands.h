// Operands of a few keys for a few queries: the keys are multiplied as they lie, where to bring them
// across would take most of the time.

#if defined(ZETA_EMULATE)
constexpr int64_t FEW = 0;  // That library shows, on small calls, that the other products are right.
#else
constexpr int64_t FEW = 16;
#endif

// For the gradient of an output, not of weights: large scores have few digits behind the point, and
// must be rounded as they were, by zeta_decode and by zeta_weights.
inline bool are_few(const ZetaCall &call) {
    return call.source <= FEW && call.target <= FEW && !call.grad_weights;
}

struct FewOperands : FmaOperands {
    struct Columns {
        float *data;
        int64_t width, stride;

        static Columns plan(Pieces &pieces, int64_t, int64_t width) {
            const int64_t stride = row_stride(width);
            return {pieces.take<float>(FEW * stride), width, stride};
        }

        void pack(const KeyRows &rows, int64_t first, int64_t count, int64_t place) const {
            for (int64_t key = 0; key < count; ++key) {
                float *to = data + (place + key) * stride;
                if (rows.has(first + key))
                    copy_row(rows.rows.at(first + key), rows.rows.dtype, width, splat(1), to);
                else
                    clear(to, width);
            }
        }
    };

    static void make_scores(const Rows &rows, int64_t count, const Columns &columns,
                            int64_t place, int64_t num_keys, float *scores, int64_t stride) {
        for (int64_t row = 0; row < count; ++row)
            for (int64_t key = 0; key < round_up(num_keys, LANES); key += LANES)
                store(scores + row * stride + key, zeros());
        const Stream<float> keys = {columns.data + place * columns.stride, columns.stride,
                                    num_keys};
        score_keys(rows.data, rows.stride, count, keys, columns.width, scores, stride, nullptr);
    }
};
