// Operands of the kernels' products where pairs of bfloat16 are multiplied, in one, two or three
// parts. See fma_operands.h for what they are, and tile_products.h and dot_products.h for how.

template <int PARTS, int REACH>
struct PairOperands {
    static constexpr bool SCALES_QUERIES = false;  // bfloat16 queries stay what they are
    static constexpr bool TURNS_SUMS = true;
    static constexpr int64_t STEP = TILE_DEPTH;

    using Session = ProductSession;

    // An odd number of cache lines, of 16-bit numbers.
    static int64_t left_stride(int64_t depth) { return (round_up(depth, 32) / 32 | 1) * 32; }

    struct Rows {
        uint16_t *data, *turned;  // (parts, rows, width) and (parts, width, rows)
        int64_t width, stride, turned_stride, part, turned_part;

        static Rows plan(Pieces &pieces, int64_t count, int64_t width, bool is_summed) {
            Rows rows{};
            rows.width = width;
            rows.stride = left_stride(width);
            rows.turned_stride = left_stride(count);
            rows.part = round_up(count, TILE_ROWS) * rows.stride;
            rows.turned_part = round_up(width, TILE_ROWS) * rows.turned_stride;
            rows.data = pieces.take<uint16_t>(PARTS * rows.part);
            rows.turned = pieces.take<uint16_t>(is_summed ? PARTS * rows.turned_part : 0);
            if (!is_summed) rows.turned = nullptr;
            return rows;
        }

        void copy(const HeadRows &rows, int64_t first, int64_t count, float) const {
            for (int64_t row = 0; row < count; ++row)
                for (int64_t column = 0; column < round_up(width, TILE_DEPTH); column += LANES) {
                    const Floats x =
                        load_dtype(rows.at(first + row), rows.dtype, column, width - column);
                    for_parts<0, PARTS>(x, [&](int which, Ints bits) {
                        store_halves(data + which * part + row * stride + column, bits);
                    });
                }
            if (turned) turn(rows, first, count);
        }

      private:
        void turn(const HeadRows &rows, int64_t first, int64_t count) const {
            for (int64_t row = 0; row < round_up(count, TILE_DEPTH); row += LANES)
                for (int64_t column = 0; column < width; column += LANES) {
                    Floats square[LANES];
                    for (int lane = 0; lane < LANES; ++lane)
                        square[lane] = row + lane < count
                                           ? load_dtype(rows.at(first + row + lane), rows.dtype,
                                                        column, width - column)
                                           : zeros();
                    transpose(square);
                    for (int lane = 0; lane < LANES; ++lane)
                        for_parts<0, PARTS>(square[lane], [&](int which, Ints bits) {
                            store_halves(turned + which * turned_part +
                                             (column + lane) * turned_stride + row,
                                         bits);
                        });
                }
        }
    };

    struct Columns {
        uint32_t *data;  // (parts, panels, pairs of features, 16 keys)
        int64_t width, panel, part;

        static Columns plan(Pieces &pieces, int64_t length, int64_t width) {
            const int64_t panel = round_up(width, TILE_DEPTH) / 2 * 16;
            const int64_t part = round_up(length, 32) / 16 * panel;
            return {pieces.take<uint32_t>(PARTS * part), width, panel, part};
        }

        void pack(const KeyRows &rows, int64_t first, int64_t count, int64_t place) const {
            for (int64_t row = 0; row < round_up(count, 16); row += LANES) {
                const IsThere is_there(rows, first + row, count - row);
                for (int64_t column = 0; column < round_up(width, TILE_DEPTH); column += LANES) {
                    Floats square[LANES];
                    for (int lane = 0; lane < LANES; ++lane)
                        square[lane] =
                            is_there.at[lane] ? rows.load(first + row + lane, column) : zeros();
                    transpose(square);
                    uint32_t *to = data + (place + row) / 16 * panel + (place + row) % 16 +
                                   column / 2 * 16;
                    for (int lane = 0; lane < LANES; lane += 2)
                        for_pairs<0, PARTS>(
                            square[lane], square[lane + 1], [&](int which, Ints bits) {
                                store_bits(to + which * part + lane / 2 * 16, bits);
                            });
                }
            }
        }
    };

    struct Values {
        uint32_t *data;  // (parts, panels, pairs of keys, 16 features)
        int64_t width, panel, part;

        static Values plan(Pieces &pieces, int64_t length, int64_t width) {
            const int64_t panel = round_up(length, TILE_DEPTH) / 2 * 16;
            const int64_t part = round_up(width, 16) / 16 * panel;
            return {pieces.take<uint32_t>(PARTS * part), width, panel, part};
        }

        void pack(const KeyRows &rows, int64_t first, int64_t count, int64_t place) const {
            const auto is_there = [&](int64_t row) { return row < count && rows.has(first + row); };
            for (int64_t row = 0; row < round_up(count, TILE_DEPTH); row += 2) {
                const bool even = is_there(row), odd = is_there(row + 1);
                for (int64_t column = 0; column < round_up(width, 16); column += LANES) {
                    uint32_t *to =
                        data + column / 16 * panel + (place + row) / 2 * 16 + column % 16;
                    for_pairs<0, PARTS>(even ? rows.load(first + row, column) : zeros(),
                                        odd ? rows.load(first + row + 1, column) : zeros(),
                                        [&](int which, Ints bits) {
                                            store_bits(to + which * part, bits);
                                        });
                }
            }
        }
    };

    struct Weights {
        uint16_t *data;   // (parts, queries, keys)
        uint32_t *pairs;  // (parts, pairs of queries, keys)
        int64_t stride, pair_stride, part, pair_part;

        static Weights plan(Pieces &pieces, int64_t count, int64_t num_keys, bool is_left,
                            bool is_summed) {
            Weights weights{};
            weights.stride = left_stride(num_keys);
            weights.pair_stride = row_stride(num_keys);
            weights.part = round_up(count, TILE_ROWS) * weights.stride;
            weights.pair_part = round_up(count, TILE_DEPTH) / 2 * weights.pair_stride;
            if (is_left) weights.data = pieces.take<uint16_t>(PARTS * weights.part);
            if (is_summed) weights.pairs = pieces.take<uint32_t>(PARTS * weights.pair_part);
            return weights;
        }

        void take(const float *tile, int64_t tile_stride, int64_t count, int64_t num_keys) const {
            const int64_t written = round_up(num_keys, LANES);
            const auto read = [&](int64_t row, int64_t key) {
                return row < count && key < written ? load(tile + row * tile_stride + key)
                                                    : zeros();
            };
            if (data)
                for (int64_t row = 0; row < count; ++row)
                    for (int64_t key = 0; key < round_up(num_keys, TILE_DEPTH); key += LANES)
                        for_parts<0, PARTS>(read(row, key), [&](int which, Ints bits) {
                            store_halves(data + which * part + row * stride + key, bits);
                        });
            if (!pairs) return;
            for (int64_t row = 0; row < round_up(count, TILE_DEPTH); row += 2)
                for (int64_t key = 0; key < round_up(num_keys, 16); key += LANES)
                    for_pairs<0, PARTS>(
                        read(row, key), read(row + 1, key), [&](int which, Ints bits) {
                            store_bits(pairs + which * pair_part + row / 2 * pair_stride + key,
                                       bits);
                        });
        }
    };

    static void make_scores(const Rows &rows, const Columns &columns, int64_t place, float *scores,
                            int64_t stride, const Stairs &stairs) {
        multiply_pairs<PARTS, REACH>(
            stairs.queries, stairs.keys, {rows.data, rows.stride, rows.part},
            {columns.data + place / 16 * columns.panel, 16, columns.panel, columns.part}, scores,
            stride, false, [&](int64_t query, int64_t queries, int64_t key, int64_t keys) {
                return stairs.features_of(query, queries, key, keys, rows.width);
            });
    }

    static void make_outputs(const Weights &weights, const Values &values, int64_t place,
                             float *outputs, int64_t stride, bool adds, const Stairs &stairs) {
        multiply_pairs<PARTS, REACH>(
            stairs.queries, values.width, {weights.data, weights.stride, weights.part},
            {values.data + place / 2 * 16, 16, values.panel, values.part}, outputs, stride, adds,
            [&](int64_t query, int64_t queries, int64_t, int64_t) {
                return stairs.keys_of(query, queries);
            });
    }

    static void add_sums(const Weights &weights, const Rows &rows, float *sums, int64_t stride,
                         int64_t place, const Stairs &stairs) {
        multiply_pairs<PARTS, REACH>(
            rows.width, stairs.keys, {rows.turned, rows.turned_stride, rows.turned_part},
            {weights.pairs, weights.pair_stride, 16, weights.pair_part}, sums + place, stride, true,
            [&](int64_t, int64_t, int64_t key, int64_t keys) {
                return stairs.queries_of(key, keys);
            });
    }

  private:
    static void store_bits(uint32_t *to, Ints bits) {
        store_ints(reinterpret_cast<int32_t *>(to), bits);
    }
};
