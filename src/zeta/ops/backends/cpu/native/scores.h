// From products to scores: what is done between q . k and the softmax, row by row. Hidden scores
// are -infinity.

// The offset biases of all heads, their ends repeated, so that the offsets of consecutive keys lie
// one after the other wherever a tile lies. Of head h, the offset o is at
// h * length + o + reach + pad.
struct OffsetTable {
    const float *data;
    int64_t reach, pad, length;

    static int64_t pad_of(const ZetaCall &call) {
        return smaller(TILE_KEYS, round_up(call.source, LANES));
    }
    static int64_t length_of(const ZetaCall &call) {
        return 2 * (call.reach + pad_of(call)) + 1;
    }

    // Where the offsets of a tile begin, from the difference of its first key and the query.
    int64_t start(int64_t offset) const {
        return smaller(larger(offset + reach + pad, 0), length - pad);
    }
};

inline OffsetTable make_offsets(const ZetaCall &call, float *to) {
    const OffsetTable table{to, call.reach, OffsetTable::pad_of(call),
                            OffsetTable::length_of(call)};
    for (int64_t head = 0; head < call.heads; ++head) {
        const float *from = call.offsets_HR + head * (2 * call.reach + 1);
        const int64_t last = 2 * call.reach;
        float *first = to + head * table.length;
        for (int64_t place = 0; place < table.pad; ++place) {
            first[place] = from[0];
            first[table.pad + last + 1 + place] = from[last];
        }
        memcpy(first + table.pad, from, (last + 1) * sizeof(float));
    }
    return table;
}

// The row of a plane that belongs to one query of one head.
struct PlaneRow {
    const void *data;
    int64_t dtype, start, column;
};

inline PlaneRow plane_row(const ZetaPlane &plane, int64_t batch, int64_t head, int64_t query,
                          int64_t key) {
    return {plane.data, plane.dtype,
            batch * plane.batch + head * plane.head + query * plane.row + key * plane.column,
            plane.column};
}

inline Floats load_plane(const PlaneRow &row, int64_t key, int64_t count) {
    if (row.dtype == ZETA_FLOAT32 && row.column == 1 && count >= LANES)
        return load(static_cast<const float *>(row.data) + row.start + key);
    return load_any(row.data, row.dtype, row.start + key * row.column, row.column, count);
}

inline Mask is_kept(const uint8_t *row, int64_t stride, int64_t key, int64_t count) {
    alignas(64) uint8_t bytes[LANES] = {};
    if (stride != 1 || count < LANES) {
        for (int64_t lane = 0; lane < LANES && lane < count; ++lane)
            bytes[lane] = row[(key + lane) * stride];
        return greater(load_bytes(bytes), splat_int(0));
    }
    return greater(load_bytes(row + key), splat_int(0));
}

// How one head scores.
struct Scores {
    const ZetaCall &call;
    const Sight &sight;
    int64_t batch, head;
    float factor;  // of the products
    float cap_inner, cap_outer;
    OffsetTable offsets;  // data is null where there is none
    float slope;
    uint32_t sequence;  // hash

    Scores(const ZetaCall &call, const Sight &sight, const OffsetTable &offsets, int64_t batch,
           int64_t head, float factor)
        : call(call),
          sight(sight),
          batch(batch),
          head(head),
          factor(factor),
          cap_inner(call.softcap ? static_cast<float>(1 / call.softcap) : 0),
          cap_outer(static_cast<float>(call.softcap)),
          offsets(offsets),
          slope(call.slopes_H ? call.slopes_H[head] : 0),
          sequence(call.dropout_p > 0 ? sequence_hash(call.seed, batch, head) : 0) {
        if (offsets.data) this->offsets.data += head * offsets.length;
    }

    bool is_plain() const { return !offsets.data && has_at_most_offsets(); }
    bool has_at_most_offsets() const {
        return !call.softcap && !call.slopes_H && !call.dense.data && !call.keep.data &&
               !sight.document_columns;
    }
};

// What there is to do to a row: the cheap and common cases have code of their own.
enum class RowKind { PLAIN, OFFSETS, GENERAL };

// The parts of a row of scores that are the same for all its keys.
struct ScoreRow {
    const Scores &scores;
    const KeyTile &tile;
    Range range;
    bool is_hidden, is_cut;
    int64_t first, end;  // the vectors of keys with one that is seen, or more; the others are hidden
    int64_t position, document;
    const float *offsets;
    PlaneRow dense;
    const uint8_t *keep;

    ScoreRow(const Scores &scores, const KeyTile &tile, int64_t query)
        : scores(scores),
          tile(tile),
          range(scores.sight.of_position(scores.sight.position(query))),
          is_hidden(tile.ends.highest < range.low || tile.ends.lowest >= range.high),
          is_cut(tile.ends.lowest < range.low || tile.ends.highest >= range.high),
          first(0),
          end(tile.padded),
          position(scores.sight.position(query)),
          document(0),
          offsets(nullptr),
          dense{},
          keep(nullptr) {
        if (is_cut && !is_hidden && !scores.sight.key_positions) {
            first = round_down(larger(range.low - tile.first, 0), LANES);
            end = smaller(round_up(range.high - tile.first, LANES), tile.padded);
        }
        if (scores.is_plain()) return;
        const ZetaCall &call = scores.call;
        if (scores.offsets.data && !scores.sight.key_positions)
            offsets = scores.offsets.data + scores.offsets.start(tile.first - position);
        if (call.dense.data)
            dense = plane_row(call.dense, scores.batch, scores.head, query, tile.first);
        if (call.keep.data)
            keep = static_cast<const uint8_t *>(call.keep.data) +
                   plane_row(call.keep, scores.batch, scores.head, query, tile.first).start;
        if (tile.has_documents) document = scores.sight.document_rows[query];
    }

    RowKind kind() const {
        if (!scores.has_at_most_offsets()) return RowKind::GENERAL;
        if (is_cut && scores.sight.key_positions) return RowKind::GENERAL;
        if (!scores.offsets.data) return RowKind::PLAIN;
        return offsets ? RowKind::OFFSETS : RowKind::GENERAL;
    }

    Ints positions(int64_t key) const {
        if (scores.sight.key_positions) return load_ints(tile.positions + key);
        return add(lane_numbers(), splat_int(static_cast<int32_t>(tile.first + key)));
    }

    Mask in_range(int64_t key) const {
        const Ints at = positions(key);
        return both(greater(at, splat_int(static_cast<int32_t>(range.low - 1))),
                    greater(splat_int(static_cast<int32_t>(range.high)), at));
    }

    Mask visible(int64_t key) const {
        Mask seen = in_range(key);
        if (tile.has_documents) seen = both(seen, equal_long(tile.documents + key, document));
        if (keep) {
            const int64_t stride = scores.call.keep.column;
            seen = both(seen, is_kept(keep, stride, key, tile.count - key));
        }
        return seen;
    }

    Floats far_offsets(int64_t key) const {
        const OffsetTable &table = scores.offsets;
        const Ints reach = splat_int(static_cast<int32_t>(table.reach));
        const Ints offset = subtract(positions(key), splat_int(static_cast<int32_t>(position)));
        const Ints bounded = min(max(offset, subtract(splat_int(0), reach)), reach);
        return gather(table.data + table.reach + table.pad, bounded);
    }

    // The score of a vector of keys, and through `slope` the derivative of the soft cap.
    template <RowKind KIND>
    __attribute__((always_inline)) Floats finish(Floats x, int64_t key, Floats &slope) const {
        x = x * splat(scores.factor);
        if (KIND != RowKind::GENERAL) {
            if (KIND == RowKind::OFFSETS) x = x + load(offsets + key);
            const bool is_between = first < key && key + LANES < end;
            return is_cut && !is_between ? select(in_range(key), x, splat(-INFINITY)) : x;
        }
        const ZetaCall &call = scores.call;
        if (call.softcap && call.softcap_first) x = capped(x, slope);
        if (offsets)
            x = x + load(offsets + key);
        else if (scores.offsets.data)
            x = x + far_offsets(key);
        if (call.slopes_H) {
            const Ints offset =
                subtract(positions(key), splat_int(static_cast<int32_t>(position)));
            x = fma(splat(-scores.slope), abs(to_floats(offset)), x);
        }
        if (dense.data) x = x + load_plane(dense, key, tile.count - key);
        if (call.softcap && !call.softcap_first) x = capped(x, slope);
        if (is_cut || tile.has_documents || keep)
            x = select(visible(key), x, splat(-INFINITY));
        return x;
    }

    Floats capped(Floats x, Floats &slope) const {
        const Floats t = tanh(x * splat(scores.cap_inner));
        slope = splat(1.0f) - t * t;
        return t * splat(scores.cap_outer);
    }
};

// The vectors of a row without a key that is seen.
inline void fill_unseen(const ScoreRow &row, float *to, float value) {
    if (!row.is_cut) return;
    fill(to, 0, row.first, value);
    fill(to, row.end, row.tile.padded, value);
}

template <RowKind KIND>
inline Floats finish_row(const ScoreRow &row, float *products) {
    fill_unseen(row, products, -INFINITY);
    const int64_t end = row.end;
    Floats highest = splat(-INFINITY), unused = zeros();
    for (int64_t key = row.first; key < end; key += LANES) {
        const Floats score = row.finish<KIND>(load(products + key), key, unused);
        store(products + key, score);
        highest = max(highest, score);
    }
    return highest;
}

// Makes scores of a row of products, in place, and finds the largest.
inline Floats finish_row(const ScoreRow &row, float *products) {
    if (row.is_hidden) {
        fill(products, 0, row.tile.padded, -INFINITY);
        return splat(-INFINITY);
    }
    switch (row.kind()) {
        case RowKind::PLAIN: {
            if (row.is_cut || row.scores.factor != 1)
                return finish_row<RowKind::PLAIN>(row, products);
            Floats of[SEVERAL];
            unrolled<SEVERAL>([&](auto i) { of[i] = splat(-INFINITY); });
            for_vectors(0, row.tile.padded, [&](int64_t key, auto count) {
                unrolled<count>([&](auto i) { of[i] = max(of[i], load(products + key + i * LANES)); });
            });
            Floats highest = of[0];
            unrolled<SEVERAL>([&](auto i) { highest = max(highest, of[i]); });
            return highest;
        }
        case RowKind::OFFSETS: return finish_row<RowKind::OFFSETS>(row, products);
        default: return finish_row<RowKind::GENERAL>(row, products);
    }
}
