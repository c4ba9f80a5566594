// Products of pairs by dot products of AVX-512 BF16.

struct ProductSession {};

// Each lane holds a pair.
struct MultiplyPairs {
    static Floats apply(Floats a, Floats b, Floats c) {
        return add_pair_products(as_ints(a), as_ints(b), c);
    }
};

// C = A B, or C += A B, of one part: a pair is read as if it were one float32 number.
template <int PARTS, int REACH, class Depth>
inline void multiply_pairs(int64_t rows, int64_t columns, PairLeft a, PairRight b, float *c,
                           int64_t c_row, bool adds, const Depth &depth) {
    static_assert(PARTS == 1 && REACH == 0, "more parts are slower here than float32 itself");
    // B has panels of 16 columns.
    const int64_t panels = PANEL / 16, vector = LANES == 16 ? b.panel : LANES;
    multiply<MultiplyPairs, false>(
        rows, round_up(columns, LANES), {reinterpret_cast<const float *>(a.data), a.row / 2},
        {reinterpret_cast<const float *>(b.data), b.row, vector, panels * b.panel}, c, c_row, adds,
        [&](int64_t row, int64_t num_rows, int64_t column, int64_t num_columns) {
            const Span span = depth(row, num_rows, column, num_columns);
            return Span{span.begin / 2, divide_up(span.end, 2)};
        });
}
