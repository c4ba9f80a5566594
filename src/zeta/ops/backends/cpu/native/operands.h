// Rows of queries, keys and values, of any dtype and stride, brought into the form in which they
// are multiplied: float32, padded with zeros, contiguous.

// The rows of one head.
struct HeadRows {
    char *data;
    int64_t dtype, row;

    int64_t bytes() const { return dtype == ZETA_FLOAT32 ? 4 : 2; }
    const void *at(int64_t index) const { return data + index * row * bytes(); }
    void *at(int64_t index) { return data + index * row * bytes(); }
};

inline HeadRows head_rows(const ZetaRows &rows, int64_t dtype, int64_t batch, int64_t head) {
    HeadRows found{static_cast<char *>(rows.data), dtype, rows.row};
    if (found.data) found.data += (batch * rows.batch + head * rows.head) * found.bytes();
    return found;
}

inline Floats load_dtype(const void *from, int64_t dtype, int64_t offset, int64_t count) {
    return load_any(from, dtype, offset, 1, count);
}

inline void store_dtype(void *to, int64_t dtype, int64_t offset, Floats x, int64_t count) {
    switch (dtype) {
        case ZETA_BFLOAT16: return store_first(static_cast<BFloat16 *>(to) + offset, x, count);
        case ZETA_FLOAT16: return store_first(static_cast<Float16 *>(to) + offset, x, count);
        default: return store_first(static_cast<float *>(to) + offset, x, count);
    }
}

// The stride of rows of `width` numbers: an odd number of cache lines, so that a column of them
// does not fall on few sets of the cache.
inline int64_t row_stride(int64_t width) { return (round_up(width, 16) / 16 | 1) * 16; }

inline void copy_row(const void *from, int64_t dtype, int64_t width, Floats factor, float *to) {
    for (int64_t column = 0; column < width; column += LANES)
        store(to + column, load_dtype(from, dtype, column, width - column) * factor);
}

inline void clear(float *to, int64_t count) { memset(to, 0, count * sizeof(float)); }

// A block of rows times a factor, padded to vectors: row i at to + i * stride.
inline void copy_rows(const HeadRows &rows, int64_t first, int64_t count, int64_t width,
                      float factor, float *to, int64_t stride) {
    for (int64_t row = 0; row < count; ++row)
        copy_row(rows.at(first + row), rows.dtype, width, splat(factor), to + row * stride);
}

// Which keys there are at all. What lies at the others is never read as a number: it may be NaN.
struct Existing {
    int64_t first, length;        // before and from there on, nobody sees any
    const int32_t *positions;     // none where negative
    int64_t padding;              // of the positions
    const uint8_t *keep;          // a mask that is the same for all queries and heads
    int64_t keep_stride;

    bool has(int64_t key) const {
        if (key < first || key >= length) return false;
        if (positions && (positions[key] < 0 || positions[key] >= padding)) return false;
        return !keep || keep[key * keep_stride];
    }
};

// Rows of keys or values as columns of B: the panel p of PANEL features at to + p * panel, row i of
// it at i * PANEL. Rows that do not exist are zero.
inline void copy_panels(const HeadRows &rows, const Existing &existing, int64_t first,
                        int64_t count, int64_t width, float *to, int64_t panel) {
    for (int64_t row = 0; row < count; ++row) {
        const bool exists = existing.has(first + row);
        for (int64_t column = 0; column < width; column += LANES) {
            float *place = to + column / PANEL * panel + row * PANEL + column % PANEL;
            store(place, exists ? load_dtype(rows.at(first + row), rows.dtype, column,
                                             width - column)
                                : zeros());
        }
    }
}

// Rows of keys or values as rows of B's transpose: the panel p of PANEL keys at
// to + p * PANEL * width, feature d of it at d * PANEL. `count` is filled up to a whole panel.
inline void copy_transposed(const HeadRows &rows, const Existing &existing, int64_t first,
                            int64_t count, int64_t width, float *to) {
    for (int64_t row = 0; row < round_up(count, PANEL); row += LANES) {
        float *panel = to + row / PANEL * PANEL * width + row % PANEL;
        for (int64_t column = 0; column < width; column += LANES) {
            Floats square[LANES];
            for (int lane = 0; lane < LANES; ++lane) {
                const int64_t key = first + row + lane;
                square[lane] = row + lane < count && existing.has(key)
                                   ? load_dtype(rows.at(key), rows.dtype, column, width - column)
                                   : zeros();
            }
            transpose(square);
            const int64_t features = smaller(LANES, width - column);
            for (int64_t d = 0; d < features; ++d) store(panel + (column + d) * PANEL, square[d]);
        }
    }
}
