// Products of few rows with many keys or values where both are bfloat16 and the processor multiplies
// pairs of it. See short_rows.h, whose terms these are.
//
// A pair of a key is two of its features, and meets those of a query. A pair of values is one feature
// of two keys, and meets their weights.

// What is left of a row, filled up with zeros.
inline Ints pair_first(const BFloat16 *from, int64_t count) {
    if (count >= PAIR) return pair(from);
    BFloat16 numbers[PAIR] = {};
    if (count > 0) memcpy(numbers, from, count * sizeof(BFloat16));
    return pair(numbers);
}

template <int ROWS, bool ODD, bool WHOLE>
inline Floats multiply_keys(const BFloat16 *queries, int64_t query_stride,
                            const Stream<BFloat16> &keys, int64_t features) {
    constexpr int KEYS = LANES / ROWS;
    Floats sums[LANES];
    unrolled<LANES>([&](auto i) { sums[i] = zeros(); });
    const auto add_key = [&](auto k, int64_t feature, Ints key) __attribute__((always_inline)) {
        unrolled<ROWS>([&](auto r) {
            const Ints query = pair(queries + r * query_stride + feature);
            sums[r * KEYS + k] = add_pair_products(query, key, sums[r * KEYS + k]);
        });
    };
    unrolled<KEYS>([&](auto k) __attribute__((always_inline)) {
        if (!WHOLE && k >= keys.count) return;
        const BFloat16 *from = keys.data + k * keys.stride;
        int64_t feature = 0;
        for (; feature <= features - PAIR; feature += PAIR)
            add_key(k, feature, pair(from + feature));
        if (ODD) add_key(k, feature, pair_first(from + feature, features - feature));
    });
    return sums_of_lanes(sums);
}

inline Ints pair_of_weights(const BFloat16 *weights, bool is_alone) {
    int32_t both = weights->bits;
    if (!is_alone) memcpy(&both, weights, sizeof both);
    return splat_int(both);
}

// to[row] += weights[row][key] * values[key] of ROWS rows and PAIRS pairs of vectors of features, or,
// where it is one, of up to `count` features of it. Sums are in the order in which they are interleaved.
template <int ROWS, int PAIRS>
inline void add_paired(const BFloat16 *weights, int64_t weight_stride,
                       const Stream<BFloat16> &values, int64_t count, float *to,
                       int64_t to_stride) {
    constexpr int VECTORS = 2 * PAIRS;
    Floats sums[ROWS][VECTORS];
    unrolled<ROWS>([&](auto r) {
        unrolled<VECTORS>([&](auto v) { sums[r][v] = zeros(); });
    });
    const auto add_keys = [&](int64_t key, bool is_alone) __attribute__((always_inline)) {
        const BFloat16 *one = values.data + key * values.stride;
        const BFloat16 *other = is_alone ? one : one + values.stride;
        Ints pairs[VECTORS];
        unrolled<PAIRS>([&](auto p) {
            const Ints a = pair_first(one + p * PAIR, count);
            const Ints b = is_alone ? splat_int(0) : pair_first(other + p * PAIR, count);
            pairs[2 * p] = interleave_low(a, b);
            pairs[2 * p + 1] = interleave_high(a, b);
        });
        unrolled<ROWS>([&](auto r) {
            const Ints weight = pair_of_weights(weights + r * weight_stride + key, is_alone);
            unrolled<VECTORS>([&](auto v) {
                sums[r][v] = add_pair_products(weight, pairs[v], sums[r][v]);
            });
        });
    };
    int64_t key = 0;
    for (; key <= values.count - 2; key += 2) add_keys(key, false);
    if (key < values.count) add_keys(key, true);
    unrolled<ROWS>([&](auto r) {
        unrolled<VECTORS>([&](auto v) {
            float *place = to + r * to_stride + v * LANES;
            store(place, load(place) + sums[r][v]);
        });
    });
}

template <int ROWS>
inline void paired_value_block(const BFloat16 *weights, int64_t weight_stride,
                               const Stream<BFloat16> &values, int64_t features, float *to,
                               int64_t to_stride) {
    // As many sums as there are registers for.
    constexpr int PAIRS = (ROWS > 2 ? 1 : 2) * (LANES == 16 ? 2 : 1);
    int64_t feature = 0;
    for (int64_t left; (left = features - feature) > 0;) {
        const Stream<BFloat16> from = {values.data + feature, values.stride, values.count};
        const int pairs = left >= PAIRS * PAIR ? PAIRS : PAIRS > 2 && left >= 2 * PAIR ? 2 : 1;
        const auto add = pairs == PAIRS ? add_paired<ROWS, PAIRS>
                         : pairs == 2   ? add_paired<ROWS, 2>
                                        : add_paired<ROWS, 1>;
        add(weights, weight_stride, from, left, to + feature, to_stride);
        feature += pairs * PAIR;
    }
}

// As WideRows.
struct PairedRows {
    using Number = BFloat16;
    static constexpr bool SCALES_QUERIES = false;

    static void take_query(const BFloat16 *from, int64_t features, float, BFloat16 *to) {
        for (int64_t feature = 0; feature < features; feature += PAIR)
            store_ints(reinterpret_cast<int32_t *>(to + feature),
                       pair_first(from + feature, features - feature));
    }

    static void take_weights(float *row, int64_t count) {
        BFloat16 *to = reinterpret_cast<BFloat16 *>(row);
        // Behind what is read.
        for (int64_t key = 0; key < count; key += LANES) {
            // `store` is this class's own here.
            store_halves(&to[key].bits, round_to_bfloat16(load(row + key)));
        }
    }

    static void score(const BFloat16 *queries, int64_t query_stride, int64_t num_rows,
                      const Stream<BFloat16> &keys, int64_t features, float *scores,
                      int64_t score_stride, float *) {
        for_near(keys, num_rows, [&](int64_t first, const Stream<BFloat16> &part) {
            for_blocks(num_rows, [&](int64_t row, auto rows) {
                score_block<rows.value>(queries + row * query_stride, query_stride, part, features,
                                        scores + row * score_stride + first, score_stride, false);
            });
        });
    }

    static void add(const BFloat16 *weights, int64_t weight_stride, int64_t num_rows,
                    const Stream<BFloat16> &values, int64_t features, float *to,
                    int64_t to_stride, float *) {
        for_near(values, num_rows, [&](int64_t first, const Stream<BFloat16> &part) {
            for_blocks(num_rows, [&](int64_t row, auto rows) {
                paired_value_block<rows.value>(weights + row * weight_stride + first,
                                               weight_stride, part, features,
                                               to + row * to_stride, to_stride);
            });
        });
    }

    static void store(const float *from, int64_t features, float factor, BFloat16 *to) {
        for (int64_t feature = 0; feature < features; feature += PAIR) {
            float natural[PAIR];
            for (int place = 0; place < LANES; ++place) {
                // Four of each 128 bits of a row went to the lower half, four to the upper.
                const int at = place / 4 * 8 + place % 4;
                natural[at] = from[feature + place];
                natural[at + 4] = from[feature + LANES + place];
            }
            const int64_t left = features - feature;
            store_first(to + feature, load(natural) * splat(factor), left);
            store_first(to + feature + LANES, load(natural + LANES) * splat(factor), left - LANES);
        }
    }

  private:
    // Parts that stay near while all rows pass over them.
    template <class Body>
    static void for_near(const Stream<BFloat16> &from, int64_t num_rows, const Body &body) {
        const int64_t most = num_rows <= BLOCK ? from.count : 64;
        for (int64_t first = 0; first < from.count; first += most)
            body(first, from.part(first, smaller(most, from.count - first)));
    }
};
