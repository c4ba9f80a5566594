// Matrix products in float32 by fused multiply-adds: C = A B, or C += A B.
//
// A is read number by number, B by vectors; C stays in registers over the whole depth. Columns are
// counted in whole vectors: B and C are padded to a multiple of LANES.

constexpr int BLOCK_ROWS = LANES == 16 ? 12 : 6;
constexpr int BLOCK_VECTORS = 2;
constexpr int PANEL = BLOCK_VECTORS * LANES;

// A: row `i` and depth `k` at i * row + k * depth; one of the two strides is 1.
struct Left {
    const float *data;
    int64_t stride;
    bool is_transposed;  // the rows are contiguous, not the depth
};

// B: a panel of PANEL columns after the other, each with rows of its own stride.
struct Right {
    const float *data;
    int64_t row, panel;
};

template <int ROWS, int VECTORS, bool TRANSPOSED>
inline void multiply_block(const float *a, int64_t a_stride, const float *b, int64_t b_row,
                           int64_t depth, float *c, int64_t c_row, bool adds) {
    Floats sums[ROWS][VECTORS];
    // Unrolled early, or the sums would pass through memory.
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v)
            sums[i][v] = adds ? load(c + i * c_row + v * LANES) : zeros();
    for (int64_t k = 0; k < depth; ++k) {
        Floats right[VECTORS];
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) right[v] = load(b + k * b_row + v * LANES);
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; ++i) {
            const Floats left = splat(TRANSPOSED ? a[k * a_stride + i] : a[i * a_stride + k]);
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; ++v) sums[i][v] = fma(left, right[v], sums[i][v]);
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) store(c + i * c_row + v * LANES, sums[i][v]);
}

using BlockProduct = void (*)(const float *, int64_t, const float *, int64_t, int64_t, float *,
                              int64_t, bool);

template <int ROWS, int VECTORS, bool TRANSPOSED>
inline BlockProduct block_product(int64_t rows) {
    if constexpr (ROWS > 1)
        if (rows < ROWS) return block_product<ROWS - 1, VECTORS, TRANSPOSED>(rows);
    return multiply_block<ROWS, VECTORS, TRANSPOSED>;
}

template <int VECTORS>
inline BlockProduct block_product(int64_t rows, bool is_transposed) {
    return is_transposed ? block_product<BLOCK_ROWS, VECTORS, true>(rows)
                         : block_product<BLOCK_ROWS, VECTORS, false>(rows);
}

// The product of A with one panel of B. Its rows are cut evenly: blocks of one or two rows would
// wait for their own sums.
template <int VECTORS>
inline void multiply_panel(int64_t rows, int64_t depth, Left a, const float *b, int64_t b_row,
                           float *c, int64_t c_row, bool adds) {
    const int64_t blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    const int64_t least = rows / blocks, longer = rows % blocks;
    const BlockProduct short_block = block_product<VECTORS>(least, a.is_transposed);
    const BlockProduct long_block = block_product<VECTORS>(least + 1, a.is_transposed);
    const int64_t a_row = a.is_transposed ? 1 : a.stride;
    int64_t row = 0;
    for (int64_t block = 0; block < blocks; ++block) {
        const bool is_long = block < longer;
        (is_long ? long_block : short_block)(a.data + row * a_row, a.stride, b, b_row, depth,
                                             c + row * c_row, c_row, adds);
        row += is_long ? least + 1 : least;
    }
}

inline void multiply(int64_t rows, int64_t columns, int64_t depth, Left a, Right b, float *c,
                     int64_t c_row, bool adds) {
    if (rows == 0) return;
    int64_t column = 0;
    const float *panel = b.data;
    for (; column + PANEL <= columns; column += PANEL, panel += b.panel)
        multiply_panel<BLOCK_VECTORS>(rows, depth, a, panel, b.row, c + column, c_row, adds);
    if (column < columns)
        multiply_panel<1>(rows, depth, a, panel, b.row, c + column, c_row, adds);
}
