// The counter-based hash that zeta/ops/dropout.py defines, split as it is: a half for each row, a
// half for each column, and what is left for each weight.

inline uint32_t mix(uint32_t x) {
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ x >> 16;
}

inline uint32_t seed_hash(int64_t seed) {
    const uint64_t bits = static_cast<uint64_t>(seed);
    return mix(mix(static_cast<uint32_t>(bits)) + static_cast<uint32_t>(bits >> 32));
}

inline uint32_t sequence_hash(int64_t seed, int64_t batch, int64_t head) {
    const uint32_t batch_hash = mix(seed_hash(seed) + static_cast<uint32_t>(batch));
    return mix(batch_hash + static_cast<uint32_t>(head));
}

inline uint32_t row_hash(uint32_t sequence, int64_t position) {
    return mix(sequence + static_cast<uint32_t>(position)) | 1;
}

inline uint32_t column_salt(int64_t seed) { return mix(seed_hash(seed) + 0x9e3779b9u); }

inline Ints mix(Ints x) {
    x = exclusive_or(x, shift_right<16>(x));
    x = multiply(x, splat_int(0x7feb352d));
    x = exclusive_or(x, shift_right<15>(x));
    x = multiply(x, splat_int(static_cast<int32_t>(0x846ca68bu)));
    return exclusive_or(x, shift_right<16>(x));
}

inline Ints column_hashes(uint32_t salt, Ints positions) {
    return either_bits(mix(add(splat_int(static_cast<int32_t>(salt)), positions)), splat_int(1));
}

// Which weights are dropped: those whose hash is below the threshold.
inline Mask dropped(Ints row, Ints columns, Ints threshold) {
    return greater(threshold, multiply(row, columns));
}
