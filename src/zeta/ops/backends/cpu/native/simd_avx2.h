// simd.h on AVX2, FMA and F16C: 8 lanes.

constexpr int LANES = 8;
using Floats = __m256;
using Ints = __m256i;  // 32 bits each
struct Mask {
    __m256 bits;  // all ones or all zeros
};

inline Floats zeros() { return _mm256_setzero_ps(); }
inline Floats splat(float x) { return _mm256_set1_ps(x); }
inline Ints splat_int(int32_t x) { return _mm256_set1_epi32(x); }
inline Ints lane_numbers() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }

inline Floats load(const float *from) { return _mm256_loadu_ps(from); }
inline Floats load(const BFloat16 *from) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i *>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
inline Floats load(const Float16 *from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)));
}
inline Floats load(const int8_t *from) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(from));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}
inline Ints load_ints(const int32_t *from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from));
}
inline Ints load_bytes(const uint8_t *from) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(from)));
}

// The bfloat16 in the low half of each lane, and in the high half.
inline Floats low_halves(Ints x) { return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)); }
inline Floats high_halves(Ints x) {
    return _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(-0x10000)));
}

inline Ints interleave_low(Ints a, Ints b) { return _mm256_unpacklo_epi16(a, b); }
inline Ints interleave_high(Ints a, Ints b) { return _mm256_unpackhi_epi16(a, b); }

inline void store(float *to, Floats x) { _mm256_storeu_ps(to, x); }
inline void store_ints(int32_t *to, Ints x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), x);
}
inline void store(Float16 *to, Floats x) {
    _mm_storeu_si128(reinterpret_cast<__m128i *>(to),
                     _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// The bits of the nearest bfloat16, ties to even, in the low half of each lane.
inline Ints round_to_bfloat16(Floats x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
}
// The low halves of the lanes, one after the other.
inline void store_halves(uint16_t *to, Ints x) {
    const __m128i halves =
        _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(to), halves);
}
inline void store(BFloat16 *to, Floats x) { store_halves(&to->bits, round_to_bfloat16(x)); }

inline Mask first_lanes(int64_t count) {
    const int32_t last = count < 0 ? 0 : count > LANES ? LANES : static_cast<int32_t>(count);
    return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(splat_int(last), lane_numbers()))};
}
inline Floats load_masked(const float *from, Mask mask) {
    return _mm256_maskload_ps(from, _mm256_castps_si256(mask.bits));
}
inline void store_masked(float *to, Floats x, Mask mask) {
    _mm256_maskstore_ps(to, _mm256_castps_si256(mask.bits), x);
}

inline void keep_in_register(Floats &x) { __asm__("" : "+v"(x)); }
// It may point to nowhere.
inline void prefetch(const void *from) { __builtin_prefetch(from); }

inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats multiply_subtract(Floats a, Floats b, Floats c) { return _mm256_fmsub_ps(a, b, c); }
// The second where either is NaN, as the processor has it.
inline Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Floats min(Floats a, Floats b) { return _mm256_min_ps(a, b); }
inline Floats abs(Floats x) { return _mm256_andnot_ps(splat(-0.0f), x); }
inline Floats to_floats(Ints x) { return _mm256_cvtepi32_ps(x); }

inline Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
inline Ints subtract(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
inline Ints multiply(Ints a, Ints b) { return _mm256_mullo_epi32(a, b); }
inline Ints exclusive_or(Ints a, Ints b) { return _mm256_xor_si256(a, b); }
inline Ints as_ints(Floats x) { return _mm256_castps_si256(x); }
inline Floats as_floats(Ints x) { return _mm256_castsi256_ps(x); }
inline Ints either_bits(Ints a, Ints b) { return _mm256_or_si256(a, b); }
inline Ints min(Ints a, Ints b) { return _mm256_min_epi32(a, b); }
inline Ints max(Ints a, Ints b) { return _mm256_max_epi32(a, b); }
template <int BITS>
inline Ints shift_right(Ints x) {
    return _mm256_srli_epi32(x, BITS);
}
template <int BITS>
inline Ints shift_left(Ints x) {
    return _mm256_slli_epi32(x, BITS);
}
inline Floats gather(const float *from, Ints index) { return _mm256_i32gather_ps(from, index, 4); }

inline Mask less(Floats a, Floats b) { return {_mm256_cmp_ps(a, b, _CMP_LT_OQ)}; }
inline Mask not_less(Floats a, Floats b) { return {_mm256_cmp_ps(a, b, _CMP_NLT_UQ)}; }
inline Mask greater(Ints a, Ints b) { return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(a, b))}; }
// Which of LANES 64-bit numbers equal one.
inline Mask equal_long(const int64_t *from, int64_t x) {
    const __m256i wanted = _mm256_set1_epi64x(x);
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from));
    const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from + 4));
    const __m256 pair = _mm256_shuffle_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi64(low, wanted)),
                                          _mm256_castsi256_ps(_mm256_cmpeq_epi64(high, wanted)),
                                          _MM_SHUFFLE(2, 0, 2, 0));
    const __m256d ordered =
        _mm256_castsi256_pd(_mm256_permute4x64_epi64(_mm256_castps_si256(pair), 0xd8));
    return {_mm256_castpd_ps(ordered)};
}
inline Mask both(Mask a, Mask b) { return {_mm256_and_ps(a.bits, b.bits)}; }
inline Mask either(Mask a, Mask b) { return {_mm256_or_ps(a.bits, b.bits)}; }
inline bool any(Mask a) { return _mm256_movemask_ps(a.bits) != 0; }
inline Floats select(Mask mask, Floats yes, Floats no) {
    return _mm256_blendv_ps(no, yes, mask.bits);
}
inline Floats unless(Mask mask, Floats no) { return _mm256_andnot_ps(mask.bits, no); }

inline float largest(Floats x) {
    __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}
inline float sum(Floats x) {
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}

// y * 2^whole, of a y near 1 and a whole of at most 127: 0 where whole is under -126.
inline Floats times_power_of_two(Floats y, Floats whole) {
    const __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(whole), 23);
    const __m256i scaled = _mm256_add_epi32(_mm256_castps_si256(y), power);
    const Floats low = _mm256_cmp_ps(whole, splat(-126.0f), _CMP_LT_OQ);
    return _mm256_andnot_ps(low, _mm256_castsi256_ps(scaled));
}

// Lanes 1, 0, 3, 2, ...
inline Floats swap_pairs(Floats x) { return _mm256_shuffle_ps(x, x, 0xb1); }

// Rows of LANES numbers become columns.
inline void transpose(Floats *rows) {
    Floats a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
        a[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
        b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
        b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
        b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
        rows[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
        rows[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
    }
}

// Lane i is the sum of the lanes of rows[i].
inline Floats sums_of_lanes(const Floats *rows) {
    Floats pair[4], quad[2];
    unrolled<4>([&](auto i) {
        const Floats a = rows[2 * i], b = rows[2 * i + 1];
        pair[i] = _mm256_blend_ps(a, b, 0xcc) + _mm256_shuffle_ps(a, b, 0x4e);
    });
    unrolled<2>([&](auto i) {
        const Floats a = pair[2 * i], b = pair[2 * i + 1];
        quad[i] = _mm256_shuffle_ps(a, b, 0x88) + _mm256_shuffle_ps(a, b, 0xdd);
    });
    return _mm256_blend_ps(quad[0], quad[1], 0xf0) +
           _mm256_permute2f128_ps(quad[0], quad[1], 0x21);
}
