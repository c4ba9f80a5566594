// Products of pairs by dot products of AVX-512 BF16; with -DZETA_EMULATE two fused multiply-adds stand
// in for one, in any vectors.

struct ProductSession {};

// Each lane holds a pair. The processor rounds denormal numbers to zero here, as AMX does.
struct MultiplyPairs {
    static Floats apply(Floats a, Floats b, Floats c) {
#if defined(ZETA_EMULATE)
        const Ints x = as_ints(a), y = as_ints(b);
        return fma(high_halves(x), high_halves(y), fma(low_halves(x), low_halves(y), c));
#else
        return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
#endif
    }
};

// C = A B, or C += A B, of one part: a pair is read as if it were one float32 number.
template <int PARTS, int REACH>
inline void multiply_pairs(int64_t rows, int64_t columns, int64_t depth, PairLeft a, PairRight b,
                           float *c, int64_t c_row, bool adds) {
    static_assert(PARTS == 1 && REACH == 0, "more parts are slower here than float32 itself");
    // B has panels of 16 columns.
    const int64_t panels = PANEL / 16, vector = LANES == 16 ? b.panel : LANES;
    multiply<MultiplyPairs, false>(
        rows, round_up(columns, LANES), (depth + 1) / 2,
        {reinterpret_cast<const float *>(a.data), a.row / 2},
        {reinterpret_cast<const float *>(b.data), b.row, vector, panels * b.panel}, c, c_row, adds);
}
