// Products of pairs by the tiles of AMX.

// Tiles 0 .. 3 are C, 4 and 5 A, 6 and 7 B.
template <int ROWS, int COLUMNS, int PARTS, int REACH>
inline void multiply_tile_block(int64_t steps, PairLeft a, PairRight b, float *c, int64_t c_row,
                                bool adds) {
    const int64_t c_bytes = c_row * 4, a_bytes = a.row * 2, b_bytes = b.row * 4;
    float *below = c + TILE_ROWS * c_row;
    if (adds) {
        load_tile<0>(c, c_bytes);
        if (COLUMNS > 1) load_tile<1>(c + 16, c_bytes);
        if (ROWS > 1) load_tile<2>(below, c_bytes);
        if (ROWS > 1 && COLUMNS > 1) load_tile<3>(below + 16, c_bytes);
    } else {
        zero_tile<0>();
        if (COLUMNS > 1) zero_tile<1>();
        if (ROWS > 1) zero_tile<2>();
        if (ROWS > 1 && COLUMNS > 1) zero_tile<3>();
    }
    for (int64_t step = 0; step < steps; ++step)
        for (int left = PARTS - 1; left >= 0; --left) {
            const uint16_t *rows = a.data + left * a.part + step * TILE_DEPTH;
            load_tile<4>(rows, a_bytes);
            if (ROWS > 1) load_tile<5>(rows + TILE_ROWS * a.row, a_bytes);
            // The smallest products first.
            for (int right = REACH - left < PARTS ? REACH - left : PARTS - 1; right >= 0;
                 --right) {
                const uint32_t *pairs = b.data + right * b.part + step * 16 * b.row;
                load_tile<6>(pairs, b_bytes);
                multiply_tiles<0, 4, 6>();
                if (ROWS > 1) multiply_tiles<2, 5, 6>();
                if (COLUMNS == 1) continue;
                load_tile<7>(pairs + b.panel, b_bytes);
                multiply_tiles<1, 4, 7>();
                if (ROWS > 1) multiply_tiles<3, 5, 7>();
            }
        }
    store_tile<0>(c, c_bytes);
    if (COLUMNS > 1) store_tile<1>(c + 16, c_bytes);
    if (ROWS > 1) store_tile<2>(below, c_bytes);
    if (ROWS > 1 && COLUMNS > 1) store_tile<3>(below + 16, c_bytes);
}

// C = A B, or C += A B: counts of rows, columns and depth are filled up to whole tiles.
template <int PARTS, int REACH, class Depth>
inline void multiply_pairs(int64_t rows, int64_t columns, PairLeft a, PairRight b, float *c,
                           int64_t c_row, bool adds, const Depth &depth) {
    for (int64_t column = 0; column < columns; column += 32) {
        const PairRight first{b.data + column / 16 * b.panel, b.row, b.panel, b.part};
        const bool is_wide = column + 16 < columns;
        for (int64_t row = 0; row < rows; row += 32) {
            const Span span = depth(row, 32, column, 32);
            const int64_t step = span.begin / TILE_DEPTH;
            const int64_t steps = divide_up(span.end, TILE_DEPTH) - step;
            const PairLeft left{a.data + row * a.row + step * TILE_DEPTH, a.row, a.part};
            const PairRight right{first.data + step * 16 * b.row, b.row, b.panel, b.part};
            float *to = c + row * c_row + column;
            const bool is_tall = row + 16 < rows;
            const auto block = is_wide ? is_tall ? multiply_tile_block<2, 2, PARTS, REACH>
                                                 : multiply_tile_block<1, 2, PARTS, REACH>
                               : is_tall ? multiply_tile_block<2, 1, PARTS, REACH>
                                         : multiply_tile_block<1, 1, PARTS, REACH>;
            block(steps, left, right, to, c_row, adds);
        }
    }
}
