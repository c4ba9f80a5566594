// Products of few rows with many keys or values, which are read where they lie, once, and in their
// order, and asked for ahead.
//
// Rows are float32, in blocks of BLOCK; there is memory for whole blocks, and a row of queries is
// followed by zeros up to a multiple of LANES. Features come in pairs of vectors, in the order in
// which they are widened fastest: of bfloat16 those of even number, then those of odd number. What
// is left after the last pair is in its natural order.

constexpr int BLOCK = 4;
constexpr int PAIR = 2 * LANES;

// So many features of a number of rows of keys stay in the nearest cache.
constexpr int64_t NEAR_FLOATS = 2048;

template <class T>
inline const T *pair(const T *from) {
    return from;
}
inline Ints pair(const BFloat16 *from) {
    return load_ints(reinterpret_cast<const int32_t *>(from));
}
template <class T>
inline Floats half_of(const T *pair, Index<0>) {
    return load(pair);
}
template <class T>
inline Floats half_of(const T *pair, Index<1>) {
    return load(pair + LANES);
}
inline Floats half_of(Ints pair, Index<0>) { return low_halves(pair); }
inline Floats half_of(Ints pair, Index<1>) { return high_halves(pair); }

template <class T>
inline void store_pair(T *to, Floats first, Floats second) {
    store(to, first);
    store(to + LANES, second);
}
inline void store_pair(BFloat16 *to, Floats first, Floats second) {
    // Neither half has a bit in common with the other.
    store_ints(reinterpret_cast<int32_t *>(to),
               add(round_to_bfloat16(first), shift_left<16>(round_to_bfloat16(second))));
}

// A row of queries times a factor, ready to meet keys of K.
template <class K, class T>
inline void arrange(const T *from, int64_t features, float factor, float *to) {
    int64_t feature = 0;
    if constexpr (sizeof(K) == sizeof(T))
        for (; feature <= features - PAIR; feature += PAIR) {
            const auto both = pair(from + feature);
            store(to + feature, half_of(both, Index<0>()) * splat(factor));
            store(to + feature + LANES, half_of(both, Index<1>()) * splat(factor));
        }
    for (; feature < features; feature += LANES)
        store(to + feature, load_first(from + feature, features - feature) * splat(factor));
}

// What was summed from values of V, times a factor, in its natural order.
template <class V, class T>
inline void store_arranged(const float *from, int64_t features, float factor, T *to) {
    int64_t feature = 0;
    if constexpr (sizeof(V) == sizeof(T))
        for (; feature <= features - PAIR; feature += PAIR)
            store_pair(to + feature, load(from + feature) * splat(factor),
                       load(from + feature + LANES) * splat(factor));
    for (; feature < features; feature += LANES)
        store_first(to + feature, load(from + feature) * splat(factor), features - feature);
}

// Whether what lies far is worth asking for ahead. Processors with AVX-512 BF16 read ahead by
// themselves, faster than any prefetch that was tried.
inline bool is_asking_worth_it() {
    return LANES < 16 || !(zeta_processor() >> ZETA_AVX512_BF16 & 1);
}

// Keys or values of one head: `count` rows of T, `stride` apart; far if they are worth asking for ahead.
template <class T>
struct Stream {
    const T *data;
    int64_t stride, count;
    bool is_far = false;

    Stream part(int64_t first, int64_t some) const {
        return {data + first * stride, stride, some, is_far};
    }
};

// Rows that are asked for so far ahead: those of keys as a whole, of values what is read at a time.
constexpr int64_t KEYS_AHEAD = 8, VALUES_AHEAD = 32;

template <class T>
inline void prefetch_row(const T *row, int64_t features) {
    constexpr int64_t OF_LINE = 64 / sizeof(T);
    for (int64_t feature = 0; feature < features; feature += OF_LINE) prefetch(row + feature);
}

// ROWS rows of queries times LANES / ROWS keys: the products of the first row with all keys, then those
// of the next. ODD: `features` is no multiple of PAIR. Not WHOLE: there are fewer keys, and what stands
// in place of the others' products means nothing.
template <int ROWS, bool ODD, bool WHOLE, class T>
inline Floats multiply_keys(const float *queries, int64_t query_stride, const Stream<T> &keys,
                            int64_t features) {
    constexpr int KEYS = LANES / ROWS;
    // As many keys at a time as there are registers for. A single row reads one key after the other,
    // as they lie.
    constexpr int TOGETHER = ROWS == 1 ? 1 : KEYS;
    Floats sums[LANES];
    unrolled<LANES>([&](auto i) { sums[i] = zeros(); });
    const auto add_products = [&](auto first, int64_t feature, const Floats *key)
                                  __attribute__((always_inline)) {
        unrolled<ROWS>([&](auto r) {
            Floats query = load(queries + r * query_stride + feature);
            // Else each product loads it again, and the loads take the time.
            if (TOGETHER > 1) keep_in_register(query);
            unrolled<TOGETHER>([&](auto k) {
                Floats &sum = sums[r * KEYS + first + k];
                sum = fma(query, key[k], sum);
            });
        });
    };
    unrolled<KEYS / TOGETHER>([&](auto group) __attribute__((always_inline)) {
        constexpr int first = group * TOGETHER;
        if (!WHOLE && first >= keys.count) return;
        const auto row = [&](int64_t k) __attribute__((always_inline)) {
            return keys.data + (WHOLE ? first + k : smaller(first + k, keys.count - 1)) * keys.stride;
        };
        int64_t feature = 0;
        for (; feature <= features - PAIR; feature += PAIR) {
            decltype(pair(keys.data)) both[TOGETHER];
            unrolled<TOGETHER>([&](auto k) { both[k] = pair(row(k) + feature); });
            unrolled<2>([&](auto half) {
                Floats key[TOGETHER];
                unrolled<TOGETHER>([&](auto k) { key[k] = half_of(both[k], half); });
                add_products(Index<first>(), feature + half * LANES, key);
            });
        }
        if (ODD)
            for (; feature < features; feature += LANES) {
                Floats key[TOGETHER];
                unrolled<TOGETHER>([&](auto k) {
                    key[k] = load_first(row(k) + feature, features - feature);
                });
                add_products(Index<first>(), feature, key);
            }
    });
    return sums_of_lanes(sums);
}

// scores[row][key] of ROWS rows of R; asks: for keys that come later.
template <int ROWS, bool ODD, class R, class T>
inline void score_block(const R *queries, int64_t query_stride, const Stream<T> &keys,
                        int64_t features, float *scores, int64_t score_stride, bool asks) {
    constexpr int KEYS = LANES / ROWS;
    float lanes[LANES];
    int64_t first = 0;
    for (; first <= keys.count - KEYS; first += KEYS) {
        for (int64_t key = first; asks && key < first + KEYS; ++key)
            prefetch_row(keys.data + (key + KEYS_AHEAD) * keys.stride, features);
        store(lanes, multiply_keys<ROWS, ODD, true>(queries, query_stride,
                                                    keys.part(first, KEYS), features));
        unrolled<ROWS>([&](auto r) {
            memcpy(scores + r * score_stride + first, lanes + r * KEYS, KEYS * sizeof(float));
        });
    }
    const int64_t left = keys.count - first;
    if (!left) return;
    store(lanes, multiply_keys<ROWS, ODD, false>(queries, query_stride, keys.part(first, left),
                                                 features));
    for (int row = 0; row < ROWS; ++row)
        for (int64_t key = 0; key < left; ++key)
            scores[row * score_stride + first + key] = lanes[row * KEYS + key];
}

template <int ROWS, class R, class T>
inline void score_block(const R *queries, int64_t query_stride, const Stream<T> &keys,
                        int64_t features, float *scores, int64_t score_stride, bool asks) {
    if (features % PAIR)
        score_block<ROWS, true>(queries, query_stride, keys, features, scores, score_stride, asks);
    else
        score_block<ROWS, false>(queries, query_stride, keys, features, scores, score_stride, asks);
}

// to[row][feature] += weights[row][key] * values[key][feature] of ROWS rows and PAIRS pairs of
// vectors of features; asks: for values that come later.
template <int ROWS, int PAIRS, class T>
inline void add_pairs(const float *weights, int64_t weight_stride, const Stream<T> &values,
                      float *to, int64_t to_stride, bool asks) {
    constexpr int VECTORS = 2 * PAIRS;
    // Of one row, several keys at a time have sums of their own: few would wait for each other.
    constexpr int KEYS = ROWS == 1 ? 4 / PAIRS : 1;
    Floats sums[KEYS][ROWS][VECTORS];
    unrolled<ROWS>([&](auto r) {
        unrolled<VECTORS>([&](auto v) {
            unrolled<KEYS>([&](auto k) { sums[k][r][v] = zeros(); });
        });
    });
    const auto add_key = [&](int64_t key, auto place) __attribute__((always_inline)) {
        const T *from = values.data + key * values.stride;
        Floats value[VECTORS];
        unrolled<PAIRS>([&](auto p) {
            if (asks) prefetch(from + VALUES_AHEAD * values.stride + p * PAIR);
            const auto both = pair(from + p * PAIR);
            value[2 * p] = half_of(both, Index<0>());
            value[2 * p + 1] = half_of(both, Index<1>());
        });
        unrolled<ROWS>([&](auto r) {
            const Floats weight = splat(weights[r * weight_stride + key]);
            unrolled<VECTORS>([&](auto v) {
                sums[place][r][v] = fma(weight, value[v], sums[place][r][v]);
            });
        });
    };
    int64_t key = 0;
    for (; key <= values.count - KEYS; key += KEYS)
        unrolled<KEYS>([&](auto k) { add_key(key + k, k); });
    for (; key < values.count; ++key) add_key(key, Index<0>());
    unrolled<ROWS>([&](auto r) {
        unrolled<VECTORS>([&](auto v) {
            Floats sum = sums[0][r][v];
            unrolled<KEYS - 1>([&](auto k) { sum = sum + sums[k + 1][r][v]; });
            float *place = to + r * to_stride + v * LANES;
            store(place, load(place) + sum);
        });
    });
}

// The same of up to LANES features.
template <int ROWS, class T>
inline void add_rest(const float *weights, int64_t weight_stride, const Stream<T> &values,
                     int64_t features, float *to, int64_t to_stride) {
    Floats sums[ROWS];
    unrolled<ROWS>([&](auto r) { sums[r] = zeros(); });
    for (int64_t key = 0; key < values.count; ++key) {
        const Floats value = load_first(values.data + key * values.stride, features);
        unrolled<ROWS>([&](auto r) {
            sums[r] = fma(splat(weights[r * weight_stride + key]), value, sums[r]);
        });
    }
    unrolled<ROWS>([&](auto r) {
        store(to + r * to_stride, load(to + r * to_stride) + sums[r]);
    });
}

template <int ROWS, class T>
inline void value_block(const float *weights, int64_t weight_stride, const Stream<T> &values,
                        int64_t features, float *to, int64_t to_stride, bool asks) {
    // As many sums as there are registers for, beside two vectors of values and a weight.
    constexpr int PAIRS = (ROWS == 1 ? 4 : ROWS == 2 ? 2 : 1) * (LANES == 16 && ROWS > 1 ? 2 : 1);
    int64_t feature = 0;
    for (int64_t left; (left = features - feature) > 0;) {
        const Stream<T> from = {values.data + feature, values.stride, values.count};
        if (left >= PAIRS * PAIR) {
            add_pairs<ROWS, PAIRS>(weights, weight_stride, from, to + feature, to_stride, asks);
            feature += PAIRS * PAIR;
        } else if (PAIRS > 2 && left >= 2 * PAIR) {
            add_pairs<ROWS, 2>(weights, weight_stride, from, to + feature, to_stride, asks);
            feature += 2 * PAIR;
        } else if (left >= PAIR) {
            add_pairs<ROWS, 1>(weights, weight_stride, from, to + feature, to_stride, asks);
            feature += PAIR;
        } else {
            add_rest<ROWS>(weights, weight_stride, from, left, to + feature, to_stride);
            feature += LANES;
        }
    }
}

// Calls `body(first, stream)` for runs of a stream that stay near while all rows pass over them,
// widened where more than one block of rows does; for the whole of it if it is passed over once.
// `near` has NEAR_FLOATS floats.
template <class T, class Body>
inline void for_near(const Stream<T> &from, int64_t features, int64_t num_rows, bool is_passed_once,
                     float *near, const Body &body) {
    if (is_passed_once) return body(0, from);
    const int64_t stride = round_up(features, LANES), most = NEAR_FLOATS / stride;
    for (int64_t first = 0; first < from.count; first += most) {
        const Stream<T> part = from.part(first, smaller(most, from.count - first));
        if (num_rows <= BLOCK || sizeof(T) == sizeof(float)) {
            body(first, part);
            continue;
        }
        for (int64_t row = 0; row < part.count; ++row) {
            if (part.is_far) prefetch_row(part.data + (row + VALUES_AHEAD) * part.stride, features);
            arrange<T>(part.data + row * part.stride, features, 1, near + row * stride);
        }
        body(first, Stream<float>{near, stride, part.count});
    }
}

// Runs `body(row, Index<rows>())` for blocks of rows.
template <class Body>
inline void for_blocks(int64_t num_rows, const Body &body) {
    int64_t row = 0;
    for (; num_rows - row > 2; row += BLOCK) body(row, Index<BLOCK>());
    if (num_rows - row == 2) body(row, Index<2>());
    if (num_rows - row == 1) body(row, Index<1>());
}

// scores[row][key] = queries[row] . keys[key]
template <class T>
inline void score_keys(const float *queries, int64_t query_stride, int64_t num_rows,
                       const Stream<T> &keys, int64_t features, float *scores,
                       int64_t score_stride, float *near) {
    for_near(keys, features, num_rows, num_rows <= BLOCK, near, [&](int64_t first, const auto &part) {
        for_blocks(num_rows, [&](int64_t row, auto rows) {
            score_block<rows.value>(queries + row * query_stride, query_stride, part, features,
                                    scores + row * score_stride + first, score_stride,
                                    part.is_far && row == 0);
        });
    });
}

// to[row] += weights[row][key] * values[key], over keys
template <class T>
inline void add_values(const float *weights, int64_t weight_stride, int64_t num_rows,
                       const Stream<T> &values, int64_t features, float *to, int64_t to_stride,
                       float *near) {
    for_near(values, features, num_rows, num_rows == 1, near, [&](int64_t first, const auto &part) {
        for_blocks(num_rows, [&](int64_t row, auto rows) {
            value_block<rows.value>(weights + row * weight_stride + first, weight_stride, part,
                                    features, to + row * to_stride, to_stride,
                                    part.is_far && row == 0);
        });
    });
}

// Rows of Q that are float32 where they meet keys and values of K, as decode.h takes them.
template <class Q, class K>
struct WideRows {
    using Number = float;  // of queries and weights
    static constexpr bool SCALES_QUERIES = true;

    static void take_query(const Q *from, int64_t features, float factor, float *to) {
        arrange<K>(from, features, factor, to);
    }
    // In place.
    static void take_weights(float *, int64_t) {}

    static void score(const float *queries, int64_t query_stride, int64_t num_rows,
                      const Stream<K> &keys, int64_t features, float *scores, int64_t score_stride,
                      float *near) {
        score_keys(queries, query_stride, num_rows, keys, features, scores, score_stride, near);
    }
    static void add(const float *weights, int64_t weight_stride, int64_t num_rows,
                    const Stream<K> &values, int64_t features, float *to, int64_t to_stride,
                    float *near) {
        add_values(weights, weight_stride, num_rows, values, features, to, to_stride, near);
    }
    static void store(const float *from, int64_t features, float factor, Q *to) {
        store_arranged<K>(from, features, factor, to);
    }
};
