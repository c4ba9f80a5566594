// Operands of the kernels' products where fused multiply-adds make them: float32.
//
// A pass is written once for this and for pairs of bfloat16 (pair_operands.h). Its products are
//
//     scores  = Rows x Columns: queries by keys, or gradients of the output by values
//     outputs = Weights x Values: weights by values, or gradients of scores by keys
//     sums    = Weights, transposed, x Rows
//
// where scores, and what weights are made of, are float32 in a block of queries by a tile of keys.

struct FmaOperands {
    static constexpr bool SCALES_QUERIES = true;  // as they are copied; else the scores are scaled
    static constexpr bool TURNS_SUMS = false;     // sums are (features, keys), not (keys, features)
    static constexpr int64_t STEP = PANEL;        // what lengths of operands are filled up to

    // What a thread needs to have set up.
    struct Session {};

    struct Rows {
        float *data;
        int64_t width, stride;

        static Rows plan(Pieces &pieces, int64_t count, int64_t width, bool) {
            const int64_t stride = row_stride(width);
            return {pieces.take<float>(count * stride), width, stride};
        }

        void copy(const HeadRows &rows, int64_t first, int64_t count, float factor) const {
            copy_rows(rows, first, count, width, factor, data, stride);
        }
    };

    struct Columns {
        float *data;
        int64_t width;

        static Columns plan(Pieces &pieces, int64_t length, int64_t width) {
            return {pieces.take<float>(round_up(length, PANEL) * width), width};
        }

        // Keys from `first` on, to the place `place`, a multiple of STEP.
        void pack(const KeyRows &rows, int64_t first, int64_t count, int64_t place) const {
            copy_transposed(rows, first, count, data + place * width);
        }
    };

    struct Values {
        float *data;
        int64_t width, panel;

        static Values plan(Pieces &pieces, int64_t length, int64_t width) {
            const int64_t rows = round_up(length, PANEL);
            return {pieces.take<float>(rows * round_up(width, PANEL)), width, rows * PANEL};
        }

        void pack(const KeyRows &rows, int64_t first, int64_t count, int64_t place) const {
            copy_panels(rows, first, round_up(count, PANEL), data + place * PANEL, panel);
        }
    };

    struct Weights {
        const float *data;
        int64_t stride;

        static Weights plan(Pieces &, int64_t, int64_t, bool, bool) { return {}; }

        void take(const float *tile, int64_t tile_stride, int64_t, int64_t) {
            data = tile;
            stride = tile_stride;
        }
    };

    static void make_scores(const Rows &rows, const Columns &columns, int64_t place, float *scores,
                            int64_t stride, const Stairs &stairs) {
        multiply<MultiplyAdd, false>(
            stairs.queries, round_up(stairs.keys, LANES), {rows.data, rows.stride},
            {columns.data + place * rows.width, PANEL, LANES, PANEL * rows.width}, scores, stride,
            false, [&](int64_t query, int64_t queries, int64_t key, int64_t keys) {
                return stairs.features_of(query, queries, key, keys, rows.width);
            });
    }

    static void make_outputs(const Weights &weights, const Values &values, int64_t place,
                             float *outputs, int64_t stride, bool adds, const Stairs &stairs) {
        multiply<MultiplyAdd, false>(
            stairs.queries, round_up(values.width, LANES), {weights.data, weights.stride},
            {values.data + place * PANEL, PANEL, LANES, values.panel}, outputs, stride, adds,
            [&](int64_t query, int64_t queries, int64_t, int64_t) {
                return stairs.keys_of(query, queries);
            });
    }

    static void add_sums(const Weights &weights, const Rows &rows, float *sums, int64_t stride,
                         int64_t place, const Stairs &stairs) {
        multiply<MultiplyAdd, true>(
            stairs.keys, round_up(rows.width, LANES), {weights.data, weights.stride},
            {rows.data, rows.stride, LANES, PANEL}, sums + place * stride, stride, true,
            [&](int64_t key, int64_t keys, int64_t, int64_t) {
                return stairs.queries_of(key, keys);
            });
    }
};
