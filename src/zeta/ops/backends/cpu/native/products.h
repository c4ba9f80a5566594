// Matrix products: C = A B, or C += A B, of float32, or of whatever else lies in a float's place and
// is multiplied into float32.
//
// A is read number by number, B by vectors; C stays in registers over the whole depth, and is added
// to at the end: the errors of a long sum grow with the roots of its parts, not with its own. Columns
// are counted in whole vectors: B and C are padded to a multiple of LANES.

constexpr int PANEL_VECTORS = 2;
constexpr int PANEL = PANEL_VECTORS * LANES;

// Vectors of a block of C, at most, and its rows: as many sums as there are registers for. Of two forms the
// wider has the fewer numbers of A to read, and the fewer rows of C to find.
constexpr int BLOCK_VECTORS = LANES == 16 ? 2 * PANEL_VECTORS : PANEL_VECTORS;
constexpr int block_rows(int vectors) { return LANES < 16 ? 6 : vectors > PANEL_VECTORS ? 6 : 12; }

// A: row `i` and depth `k` at i * stride + k; of a transposed one at i + k * stride.
struct Left {
    const float *data;
    int64_t stride;
};

// B: a panel of PANEL columns after the other. Of a panel, the rows are `row` apart, and the vectors
// of a row `vector`.
struct Right {
    const float *data;
    int64_t row, vector, panel;
};

// Which part of the depth a block of C is made of: in the rest of it a factor is 0, or nobody asks for
// the block. A `Depth` says it of `(row, rows, column, columns)`; see stairs.h.
struct Span {
    int64_t begin, end;
};

struct MultiplyAdd {
    static Floats apply(Floats a, Floats b, Floats c) { return fma(a, b, c); }
};

template <class Product, int ROWS, int VECTORS, bool TRANSPOSED>
inline void multiply_block(const float *a, int64_t a_stride, const float *b, int64_t b_row,
                           int64_t b_vector, int64_t b_panel, int64_t depth, float *c,
                           int64_t c_row, bool adds) {
    Floats sums[ROWS][VECTORS];
    // Unrolled early, or the sums would pass through memory.
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) sums[i][v] = zeros();
    for (int64_t k = 0; k < depth; ++k) {
        Floats right[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v)
            right[v] = load(b + k * b_row + v / PANEL_VECTORS * b_panel +
                            v % PANEL_VECTORS * b_vector);
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; ++i) {
            const Floats left = splat(TRANSPOSED ? a[k * a_stride + i] : a[i * a_stride + k]);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) sums[i][v] = Product::apply(left, right[v], sums[i][v]);
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) {
            float *to = c + i * c_row + v * LANES;
            store(to, adds ? load(to) + sums[i][v] : sums[i][v]);
        }
}

// Its numbers come one by one: a `Right` would pass through memory in each call.
using BlockProduct = void (*)(const float *, int64_t, const float *, int64_t, int64_t, int64_t,
                              int64_t, float *, int64_t, bool);

template <class Product, int ROWS, int VECTORS, bool TRANSPOSED>
inline BlockProduct block_product(int64_t rows) {
    if constexpr (ROWS > 1)
        if (rows < ROWS) return block_product<Product, ROWS - 1, VECTORS, TRANSPOSED>(rows);
    return multiply_block<Product, ROWS, VECTORS, TRANSPOSED>;
}

// The product of A with some vectors of B. Its rows are cut evenly: blocks of one or two rows would
// wait for their own sums.
template <class Product, int VECTORS, bool TRANSPOSED, class Depth>
inline void multiply_vectors(int64_t rows, int64_t column, Left a, Right b, float *c,
                             int64_t c_row, bool adds, const Depth &depth) {
    constexpr int BLOCK_ROWS = block_rows(VECTORS);
    const int64_t blocks = divide_up(rows, BLOCK_ROWS);
    const int64_t least = rows / blocks, longer = rows % blocks;
    const auto short_block = block_product<Product, BLOCK_ROWS, VECTORS, TRANSPOSED>(least);
    const auto long_block = block_product<Product, BLOCK_ROWS, VECTORS, TRANSPOSED>(least + 1);
    const int64_t a_row = TRANSPOSED ? 1 : a.stride, a_depth = TRANSPOSED ? a.stride : 1;
    int64_t row = 0;
    for (int64_t block = 0; block < blocks; ++block) {
        const bool is_long = block < longer;
        const int64_t count = is_long ? least + 1 : least;
        const Span span = depth(row, count, column, VECTORS * LANES);
        (is_long ? long_block : short_block)(
            a.data + row * a_row + span.begin * a_depth, a.stride, b.data + span.begin * b.row,
            b.row, b.vector, b.panel, span.end - span.begin, c + row * c_row, c_row, adds);
        row += count;
    }
}

template <class Product, bool TRANSPOSED, class Depth>
inline void multiply(int64_t rows, int64_t columns, Left a, Right b, float *c, int64_t c_row,
                     bool adds, const Depth &depth) {
    if (rows == 0) return;
    int64_t column = 0;
    const auto take = [&](auto vectors) {
        for (; column + vectors * LANES <= columns; column += vectors * LANES) {
            multiply_vectors<Product, vectors, TRANSPOSED>(rows, column, a, b, c + column, c_row,
                                                           adds, depth);
            b.data += vectors / PANEL_VECTORS * b.panel;
        }
    };
    if constexpr (BLOCK_VECTORS > PANEL_VECTORS) take(Index<BLOCK_VECTORS>());
    take(Index<PANEL_VECTORS>());
    take(Index<1>());
}
