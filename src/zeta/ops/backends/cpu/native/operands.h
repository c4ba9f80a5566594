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

inline void clear(float *to, int64_t count) { memset(to, 0, count * sizeof(float)); }

// Whole vectors, from `first` up to `end`.
inline void fill(float *to, int64_t first, int64_t end, float value) {
    for (int64_t place = first; place < end; place += LANES) store(to + place, splat(value));
}

// Every vector of `count` rows. Where heads lie side by side, the rows of one are apart from each
// other, and the processor does not foresee the next: several at once come from memory together.
template <class Body>
inline __attribute__((always_inline)) void for_vectors(const HeadRows &rows, int64_t count,
                                                       int64_t width, const Body &body) {
    constexpr int64_t AT_ONCE = 8;
    if (rows.row < 2 * width) {
        for (int64_t row = 0; row < count; ++row)
            for (int64_t column = 0; column < width; column += LANES) body(row, column);
        return;
    }
    for (int64_t first = 0; first < count; first += AT_ONCE) {
        const int64_t end = smaller(first + AT_ONCE, count);
        for (int64_t column = 0; column < width; column += LANES)
            for (int64_t row = first; row < end; ++row) body(row, column);
    }
}

// Calls `body(load)`, where load(row, column) is a vector of a row: without a look at the dtype and at
// how many numbers are left, as far as these are known.
template <class Body>
inline void with_loads(const HeadRows &rows, int64_t width, const Body &body) {
    const auto of = [&](const auto *data) {
        body([=, row_stride = rows.row](int64_t row, int64_t column) {
            return load(data + row * row_stride + column);
        });
    };
    if (width % LANES)
        return body([&](int64_t row, int64_t column) {
            return load_dtype(rows.at(row), rows.dtype, column, width - column);
        });
    switch (rows.dtype) {
        case ZETA_BFLOAT16: return of(reinterpret_cast<const BFloat16 *>(rows.data));
        case ZETA_FLOAT16: return of(reinterpret_cast<const Float16 *>(rows.data));
        default: return of(reinterpret_cast<const float *>(rows.data));
    }
}

// A block of rows times a factor, padded to vectors: row i at to + i * stride.
inline void copy_rows(const HeadRows &rows, int64_t first, int64_t count, int64_t width,
                      float factor, float *to, int64_t stride) {
    const Floats times = splat(factor);
    with_loads(rows, width, [&](const auto &load_vector) {
        for_vectors(rows, count, width, [&](int64_t row, int64_t column) {
            store(to + row * stride + column, load_vector(first + row, column) * times);
        });
    });
}

// Keys or values of one head.
struct KeyRows {
    HeadRows rows;
    int64_t width;
    const Sight &sight;
    int64_t key_head;

    bool has(int64_t key) const { return sight.has(key, key_head); }

    Floats load(int64_t key, int64_t column) const {
        return load_dtype(rows.at(key), rows.dtype, column, width - column);
    }
};

inline KeyRows keys_of(const Sight &sight, int64_t key_head) {
    const ZetaCall &call = sight.call;
    return {head_rows(call.key, call.dtype, sight.batch, key_head), call.head_dim, sight, key_head};
}

inline KeyRows values_of(const Sight &sight, int64_t key_head) {
    const ZetaCall &call = sight.call;
    return {head_rows(call.value, call.dtype, sight.batch, key_head), call.value_dim, sight,
            key_head};
}

// Which of the next keys there are, of `count`.
struct IsThere {
    bool at[LANES];

    IsThere(const KeyRows &rows, int64_t first, int64_t count) {
        const bool has_all = count >= LANES && rows.sight.has_all(first, LANES);
        for (int lane = 0; lane < LANES; ++lane)
            at[lane] = has_all || (lane < count && rows.has(first + lane));
    }
};

// Rows of keys or values, `count` filled up to whole vectors: the vector of row i that begins with
// feature d goes to place(i, d). Rows that are not there are zero.
template <class Place>
inline void copy_keys(const KeyRows &rows, int64_t first, int64_t count, const Place &place) {
    with_loads(rows.rows, rows.width, [&](const auto &load_vector) {
        for (int64_t start = 0; start < count; start += LANES) {
            const IsThere is_there(rows, first + start, count - start);
            for_vectors(rows.rows, LANES, rows.width, [&](int64_t lane, int64_t column) {
                const int64_t row = start + lane;
                store(place(row, column),
                      is_there.at[lane] ? load_vector(first + row, column) : zeros());
            });
        }
    });
}

// The same as columns of B: the panel p of PANEL features at to + p * panel, row i of it at i * PANEL.
inline void copy_panels(const KeyRows &rows, int64_t first, int64_t count, float *to,
                        int64_t panel) {
    copy_keys(rows, first, count, [&](int64_t row, int64_t column) {
        return to + column / PANEL * panel + row * PANEL + column % PANEL;
    });
}

// Rows of keys or values as rows of B's transpose: the panel p of PANEL keys at
// to + p * PANEL * width, feature d of it at d * PANEL. `count` is filled up to a whole panel.
inline void copy_transposed(const KeyRows &rows, int64_t first, int64_t count, float *to) {
    const int64_t width = rows.width;
    with_loads(rows.rows, width, [&](const auto &load_vector) {
        for (int64_t row = 0; row < round_up(count, PANEL); row += LANES) {
            float *panel = to + row / PANEL * PANEL * width + row % PANEL;
            const IsThere is_there(rows, first + row, count - row);
            for (int64_t column = 0; column < width; column += LANES) {
                Floats square[LANES];
                for (int lane = 0; lane < LANES; ++lane)
                    square[lane] =
                        is_there.at[lane] ? load_vector(first + row + lane, column) : zeros();
                transpose(square);
                const int64_t features = smaller(LANES, width - column);
                for (int64_t d = 0; d < features; ++d)
                    store(panel + (column + d) * PANEL, square[d]);
            }
        }
    });
}
