// Vectors of 8 or 16 floats, the whole of what the kernels ask of an instruction set.
//
// As every header of the kernels, it is included inside a unit's namespace (see kernels.h): the
// same name in two units is two functions, each in its own instructions.
//
// `count` is a number of lanes, from the first; one above LANES means all of them. What lies beyond
// is neither read nor written.

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

// A number as a type, so that what is indexed by it can stay in registers.
template <int NUMBER>
struct Index {
    static constexpr int value = NUMBER;
    constexpr operator int() const { return NUMBER; }
};

// body(Index<0>()), ..., body(Index<COUNT - 1>())
template <int COUNT, int FIRST = 0, class Body>
__attribute__((always_inline)) inline void unrolled(const Body &body) {
    if constexpr (FIRST < COUNT) {
        body(Index<FIRST>());
        unrolled<COUNT, FIRST + 1>(body);
    }
}

#if defined(ZETA_EMULATE)
#include "emulated_avx512.h"
#include "simd_avx512.h"
#elif defined(__AVX512F__)
#include "simd_avx512.h"
#else
#include "simd_avx2.h"
#endif

#if defined(ZETA_HAS_PAIRS)
// c + the products of a's and b's pairs of bfloat16, lane by lane. The processor takes denormal
// numbers for zero, as AMX does.
inline Floats add_pair_products(Ints a, Ints b, Floats c) {
#if defined(ZETA_EMULATE)
    return fma(low_halves(a), low_halves(b), fma(high_halves(a), high_halves(b), c));
#else
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
#endif
}
#endif

inline float widen(float x) { return x; }
inline float widen(BFloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float wide;
    memcpy(&wide, &bits, sizeof wide);
    return wide;
}
inline float widen(Float16 x) { return _cvtsh_ss(x.bits); }
inline float widen(int8_t x) { return x; }

template <class T>
inline Floats load_first(const T *from, int64_t count) {
    if (count >= LANES) return load(from);
    T lanes[LANES] = {};
    if (count > 0) memcpy(lanes, from, count * sizeof(T));
    return load(lanes);
}

template <class T>
inline void store_first(T *to, Floats x, int64_t count) {
    if (count >= LANES) return store(to, x);
    T lanes[LANES];
    store(lanes, x);
    if (count > 0) memcpy(to, lanes, count * sizeof(T));
}

template <>
inline Floats load_first(const float *from, int64_t count) {
    return count >= LANES ? load(from) : load_masked(from, first_lanes(count));
}

template <>
inline void store_first(float *to, Floats x, int64_t count) {
    count >= LANES ? store(to, x) : store_masked(to, x, first_lanes(count));
}

// Every `stride`-th number; 0 repeats one.
template <class T>
inline Floats load_strided(const T *from, int64_t stride, int64_t count) {
    if (stride == 1) return load_first(from, count);
    if (stride == 0) return splat(widen(*from));
    float lanes[LANES] = {};
    for (int64_t lane = 0; lane < LANES && lane < count; ++lane)
        lanes[lane] = widen(from[lane * stride]);
    return load(lanes);
}

inline Floats load_any(const void *from, int64_t dtype, int64_t offset, int64_t stride,
                       int64_t count) {
    switch (dtype) {
        case ZETA_BFLOAT16:
            return load_strided(static_cast<const BFloat16 *>(from) + offset, stride, count);
        case ZETA_FLOAT16:
            return load_strided(static_cast<const Float16 *>(from) + offset, stride, count);
        default:
            return load_strided(static_cast<const float *>(from) + offset, stride, count);
    }
}

// e to the power of each x, which is at most 88: relative error under 2e-7, 0 under -87.3, NaN of NaN.
// Step by step for all of them, for each would wait for its own.
template <int COUNT>
__attribute__((always_inline)) inline void exponentiate(Floats (&x)[COUNT]) {
    // x / log 2 in two parts: the first alone would be wrong by up to 2e-6 for a large x.
    const Floats high = splat(1.44269502162933349609375f), low = splat(1.925963033500925e-8f);
    // A number so large that what it is added to is rounded to a whole one, as long as that counts.
    const Floats rounding = splat(0x1.8p23f);
    Floats whole[COUNT], y[COUNT];
    unrolled<COUNT>([&](auto i) { whole[i] = fma(x[i], high, rounding) - rounding; });
    unrolled<COUNT>([&](auto i) { y[i] = multiply_subtract(x[i], high, whole[i]); });
    unrolled<COUNT>([&](auto i) { x[i] = fma(x[i], low, y[i]); });
    unrolled<COUNT>([&](auto i) { y[i] = fma(splat(1.5353362e-4f), x[i], splat(1.3398875e-3f)); });
    unrolled<COUNT>([&](auto i) { y[i] = fma(y[i], x[i], splat(9.618437e-3f)); });
    unrolled<COUNT>([&](auto i) { y[i] = fma(y[i], x[i], splat(5.5503324e-2f)); });
    unrolled<COUNT>([&](auto i) { y[i] = fma(y[i], x[i], splat(2.4022648e-1f)); });
    unrolled<COUNT>([&](auto i) { y[i] = fma(y[i], x[i], splat(6.931472e-1f)); });
    unrolled<COUNT>([&](auto i) { y[i] = fma(y[i], x[i], splat(1.0f)); });
    unrolled<COUNT>([&](auto i) { x[i] = times_power_of_two(y[i], whole[i]); });
}

inline Floats exp(Floats x) {
    Floats one[1] = {x};
    exponentiate(one);
    return one[0];
}

// For as many vectors at a time as there are registers for, body(place, Index<COUNT>()), and one by one
// before `end`.
constexpr int SEVERAL = LANES == 16 ? 4 : 1;
template <int COUNT = SEVERAL, class Body>
__attribute__((always_inline)) inline void for_vectors(int64_t first, int64_t end, const Body &body) {
    int64_t place = first;
    if constexpr (COUNT > 1)
        for (; place <= end - COUNT * LANES; place += COUNT * LANES) body(place, Index<COUNT>());
    for (; place < end; place += LANES) body(place, Index<1>());
}

// Hyperbolic tangent: relative error under 3e-7, NaN of NaN.
inline Floats tanh(Floats x) {
    const Floats square = x * x;
    Floats y = splat(-5.70498872745e-3f);
    y = fma(y, square, splat(2.06390887954e-2f));
    y = fma(y, square, splat(-5.37397155531e-2f));
    y = fma(y, square, splat(1.33314422036e-1f));
    y = fma(y, square, splat(-3.33332819422e-1f));
    const Floats near = fma(y * square, x, x);
    const Floats far = splat(1.0f) - splat(2.0f) / (exp(min(splat(40.0f), x + x)) + splat(1.0f));
    return select(less(square, splat(0.390625f)), near, far);
}
