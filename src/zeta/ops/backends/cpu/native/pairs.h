// Numbers as bfloat16, which processors multiply in pairs: what lies side by side in A meets what
// lies side by side in B, and both products go into one sum.
//
// float32 numbers are sums of bfloat16 parts: two hold 16 bits of a number, three all 24. Of the
// products of parts, those are made whose numbers, from 0, add up to REACH at most: with three parts
// and a REACH of 2 six, whose errors are float32's own.

// Counts of rows and depths are filled up to those of AMX's tiles.
constexpr int64_t TILE_ROWS = 16;
constexpr int64_t TILE_DEPTH = 32;

// The unit for what is not multiplied in pairs.
inline const ZetaPasses &without_pairs() { return zeta_passes_avx512; }

// Whether the gradient of few queries is for that unit too. Not with -DZETA_EMULATE: there small calls
// show that pairs are right.
inline bool are_too_few(const ZetaCall &call) {
#if defined(ZETA_EMULATE)
    return false;
#else
    return are_few(call);
#endif
}

// A: rows of bfloat16 along the depth. B: rows of pairs (2k, 2k + 1), in panels of 16 columns.
// Depths are filled up with zeros to a multiple of TILE_DEPTH; `part` is the distance between
// parts.
struct PairLeft {
    const uint16_t *data;
    int64_t row, part;
};
struct PairRight {
    const uint32_t *data;
    int64_t row, panel, part;
};

// The part of a vector that bfloat16 holds, in the low halves; what is left stays in x. Rounded,
// not cut off: else what is left would lean to one side.
template <bool IS_LAST>
inline Ints split(Floats &x) {
    const Ints part = round_to_bfloat16(x);
    if (!IS_LAST) x = x - as_floats(shift_left<16>(part));
    return part;
}

template <int PART, int PARTS, class Store>
inline void for_parts(Floats x, const Store &store_part) {
    if constexpr (PART < PARTS) {
        store_part(PART, split<PART + 1 == PARTS>(x));
        for_parts<PART + 1, PARTS>(x, store_part);
    }
}

// Of two rows that lie side by side in B.
template <int PART, int PARTS, class Store>
inline void for_pairs(Floats even, Floats odd, const Store &store_part) {
    if constexpr (PART < PARTS) {
        const Ints low = split<PART + 1 == PARTS>(even);
        const Ints high = split<PART + 1 == PARTS>(odd);
        store_part(PART, either_bits(low, shift_left<16>(high)));
        for_pairs<PART + 1, PARTS>(even, odd, store_part);
    }
}
