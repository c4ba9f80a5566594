// AVX-512 in software, for -DZETA_EMULATE: of its types and functions what simd_avx512.h uses, each in
// two vectors of AVX2. Inside of a unit's namespace these names hide the compiler's.

// Clang has macros of these names.
#undef _mm512_cmp_ps_mask
#undef _mm512_cvtps_ph
#undef _mm512_i32gather_ps
#undef _mm512_shuffle_f32x4
#undef _mm512_shuffle_ps

struct __m512 {
    __m256 low, high;
};
struct __m512i {
    __m256i low, high;
};

inline __m512 operator+(__m512 a, __m512 b) { return {a.low + b.low, a.high + b.high}; }
inline __m512 operator-(__m512 a, __m512 b) { return {a.low - b.low, a.high - b.high}; }
inline __m512 operator*(__m512 a, __m512 b) { return {a.low * b.low, a.high * b.high}; }
inline __m512 operator/(__m512 a, __m512 b) { return {a.low / b.low, a.high / b.high}; }

// A mask's bits as lanes of ones or zeros, and back.
inline __m256i spread_bits(uint32_t bits) {
    const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(bits), each), each);
}
inline __m512i spread_mask(__mmask16 mask) { return {spread_bits(mask), spread_bits(mask >> 8)}; }
inline __mmask16 gather_bits(__m256i low, __m256i high) {
    const uint32_t first = _mm256_movemask_ps(_mm256_castsi256_ps(low));
    const uint32_t second = _mm256_movemask_ps(_mm256_castsi256_ps(high));
    return static_cast<__mmask16>(first | second << 8);
}

inline __m512 _mm512_setzero_ps() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline __m512 _mm512_set1_ps(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline __m512i _mm512_set1_epi32(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline __m512i _mm512_set1_epi64(int64_t x) {
    return {_mm256_set1_epi64x(x), _mm256_set1_epi64x(x)};
}
inline __m512i _mm512_setr_epi32(int a, int b, int c, int d, int e, int f, int g, int h, int i,
                                 int j, int k, int l, int m, int n, int o, int p) {
    return {_mm256_setr_epi32(a, b, c, d, e, f, g, h), _mm256_setr_epi32(i, j, k, l, m, n, o, p)};
}

inline __m512 _mm512_castsi512_ps(__m512i x) {
    return {_mm256_castsi256_ps(x.low), _mm256_castsi256_ps(x.high)};
}
inline __m512i _mm512_castps_si512(__m512 x) {
    return {_mm256_castps_si256(x.low), _mm256_castps_si256(x.high)};
}

inline __m512 _mm512_loadu_ps(const float *from) {
    return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)};
}
inline __m512i _mm512_loadu_si512(const void *from) {
    const __m256i *halves = static_cast<const __m256i *>(from);
    return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
}
inline void _mm512_storeu_ps(float *to, __m512 x) {
    _mm256_storeu_ps(to, x.low);
    _mm256_storeu_ps(to + 8, x.high);
}
inline void _mm512_storeu_si512(void *to, __m512i x) {
    __m256i *halves = static_cast<__m256i *>(to);
    _mm256_storeu_si256(halves, x.low);
    _mm256_storeu_si256(halves + 1, x.high);
}
inline __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const float *from) {
    const __m512i lanes = spread_mask(mask);
    return {_mm256_maskload_ps(from, lanes.low), _mm256_maskload_ps(from + 8, lanes.high)};
}
inline void _mm512_mask_storeu_ps(float *to, __mmask16 mask, __m512 x) {
    const __m512i lanes = spread_mask(mask);
    _mm256_maskstore_ps(to, lanes.low, x.low);
    _mm256_maskstore_ps(to + 8, lanes.high, x.high);
}
inline __m512 _mm512_i32gather_ps(__m512i index, const float *from, int) {
    return {_mm256_i32gather_ps(from, index.low, 4), _mm256_i32gather_ps(from, index.high, 4)};
}

inline __m512i _mm512_cvtepu16_epi32(__m256i x) {
    return {_mm256_cvtepu16_epi32(_mm256_castsi256_si128(x)),
            _mm256_cvtepu16_epi32(_mm256_extracti128_si256(x, 1))};
}
inline __m512i _mm512_cvtepu8_epi32(__m128i x) {
    return {_mm256_cvtepu8_epi32(x), _mm256_cvtepu8_epi32(_mm_srli_si128(x, 8))};
}
inline __m512i _mm512_cvtepi8_epi32(__m128i x) {
    return {_mm256_cvtepi8_epi32(x), _mm256_cvtepi8_epi32(_mm_srli_si128(x, 8))};
}
inline __m512 _mm512_cvtepi32_ps(__m512i x) {
    return {_mm256_cvtepi32_ps(x.low), _mm256_cvtepi32_ps(x.high)};
}
inline __m256i _mm512_cvtepi32_epi16(__m512i x) {
    const __m256i halves = _mm256_set1_epi32(0xffff);
    const __m256i packed = _mm256_packus_epi32(_mm256_and_si256(x.low, halves),
                                               _mm256_and_si256(x.high, halves));
    return _mm256_permute4x64_epi64(packed, 0xd8);
}
inline __m512 _mm512_cvtph_ps(__m256i x) {
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(x)),
            _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1))};
}
// Rounded to the nearest, whatever is asked for: nothing else is.
inline __m256i _mm512_cvtps_ph(__m512 x, int) {
    return _mm256_set_m128i(_mm256_cvtps_ph(x.high, _MM_FROUND_TO_NEAREST_INT),
                            _mm256_cvtps_ph(x.low, _MM_FROUND_TO_NEAREST_INT));
}

inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline __m512 _mm512_fmsub_ps(__m512 a, __m512 b, __m512 c) {
    return {_mm256_fmsub_ps(a.low, b.low, c.low), _mm256_fmsub_ps(a.high, b.high, c.high)};
}
inline __m512 _mm512_max_ps(__m512 a, __m512 b) {
    return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}
inline __m512 _mm512_min_ps(__m512 a, __m512 b) {
    return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)};
}
inline __m512 _mm512_andnot_ps(__m512 a, __m512 b) {
    return {_mm256_andnot_ps(a.low, b.low), _mm256_andnot_ps(a.high, b.high)};
}

inline __m512i _mm512_add_epi32(__m512i a, __m512i b) {
    return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)};
}
inline __m512i _mm512_sub_epi32(__m512i a, __m512i b) {
    return {_mm256_sub_epi32(a.low, b.low), _mm256_sub_epi32(a.high, b.high)};
}
inline __m512i _mm512_mullo_epi32(__m512i a, __m512i b) {
    return {_mm256_mullo_epi32(a.low, b.low), _mm256_mullo_epi32(a.high, b.high)};
}
inline __m512i _mm512_min_epi32(__m512i a, __m512i b) {
    return {_mm256_min_epi32(a.low, b.low), _mm256_min_epi32(a.high, b.high)};
}
inline __m512i _mm512_max_epi32(__m512i a, __m512i b) {
    return {_mm256_max_epi32(a.low, b.low), _mm256_max_epi32(a.high, b.high)};
}
inline __m512i _mm512_and_si512(__m512i a, __m512i b) {
    return {_mm256_and_si256(a.low, b.low), _mm256_and_si256(a.high, b.high)};
}
inline __m512i _mm512_or_si512(__m512i a, __m512i b) {
    return {_mm256_or_si256(a.low, b.low), _mm256_or_si256(a.high, b.high)};
}
inline __m512i _mm512_xor_si512(__m512i a, __m512i b) {
    return {_mm256_xor_si256(a.low, b.low), _mm256_xor_si256(a.high, b.high)};
}
inline __m512i _mm512_slli_epi32(__m512i x, int bits) {
    return {_mm256_slli_epi32(x.low, bits), _mm256_slli_epi32(x.high, bits)};
}
inline __m512i _mm512_srli_epi32(__m512i x, int bits) {
    return {_mm256_srli_epi32(x.low, bits), _mm256_srli_epi32(x.high, bits)};
}

template <int COMPARISON>
inline __mmask16 compare(__m512 a, __m512 b) {
    return gather_bits(_mm256_castps_si256(_mm256_cmp_ps(a.low, b.low, COMPARISON)),
                       _mm256_castps_si256(_mm256_cmp_ps(a.high, b.high, COMPARISON)));
}
inline __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int comparison) {
    switch (comparison) {
        case _CMP_LT_OQ: return compare<_CMP_LT_OQ>(a, b);
        case _CMP_NLT_UQ: return compare<_CMP_NLT_UQ>(a, b);
        case _CMP_UNORD_Q: return compare<_CMP_UNORD_Q>(a, b);
        default: abort();
    }
}
inline __mmask16 _mm512_cmpgt_epi32_mask(__m512i a, __m512i b) {
    return gather_bits(_mm256_cmpgt_epi32(a.low, b.low), _mm256_cmpgt_epi32(a.high, b.high));
}
inline __mmask8 _mm512_cmpeq_epi64_mask(__m512i a, __m512i b) {
    const __m256d low = _mm256_castsi256_pd(_mm256_cmpeq_epi64(a.low, b.low));
    const __m256d high = _mm256_castsi256_pd(_mm256_cmpeq_epi64(a.high, b.high));
    return static_cast<__mmask8>(_mm256_movemask_pd(low) | _mm256_movemask_pd(high) << 4);
}

inline __m512i _mm512_mask_mov_epi32(__m512i no, __mmask16 mask, __m512i yes) {
    const __m512i lanes = spread_mask(mask);
    return {_mm256_blendv_epi8(no.low, yes.low, lanes.low),
            _mm256_blendv_epi8(no.high, yes.high, lanes.high)};
}
inline __m512 _mm512_mask_blend_ps(__mmask16 mask, __m512 no, __m512 yes) {
    return _mm512_castsi512_ps(
        _mm512_mask_mov_epi32(_mm512_castps_si512(no), mask, _mm512_castps_si512(yes)));
}
inline __m512 _mm512_maskz_mov_ps(__mmask16 mask, __m512 x) {
    return _mm512_mask_blend_ps(mask, _mm512_setzero_ps(), x);
}

inline __m512 power_of_two(__m512i whole) {
    const __m512i bias = _mm512_set1_epi32(127);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(whole, bias), 23));
}
// In two steps, for the power may be no float32 where the product is one.
inline __m512 _mm512_maskz_scalef_ps(__mmask16 mask, __m512 x, __m512 exponent) {
    const __m512i whole = {_mm256_cvtps_epi32(_mm256_floor_ps(exponent.low)),
                           _mm256_cvtps_epi32(_mm256_floor_ps(exponent.high))};
    const __m512i first = {_mm256_srai_epi32(whole.low, 1), _mm256_srai_epi32(whole.high, 1)};
    const __m512 scaled = x * power_of_two(first) * power_of_two(_mm512_sub_epi32(whole, first));
    return _mm512_maskz_mov_ps(mask, scaled);
}

inline float _mm512_reduce_add_ps(__m512 x) {
    const __m256 halves = x.low + x.high;
    const __m128 a = _mm256_castps256_ps128(halves) + _mm256_extractf128_ps(halves, 1);
    const __m128 b = a + _mm_movehl_ps(a, a);
    return b[0] + b[1];
}
inline float _mm512_reduce_max_ps(__m512 x) {
    const __m256 halves = _mm256_max_ps(x.low, x.high);
    const __m128 a =
        _mm_max_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
    const __m128 b = _mm_max_ps(a, _mm_movehl_ps(a, a));
    return b[0] > b[1] ? b[0] : b[1];
}

// Of each 128 bits.
inline __m512 _mm512_unpacklo_ps(__m512 a, __m512 b) {
    return {_mm256_unpacklo_ps(a.low, b.low), _mm256_unpacklo_ps(a.high, b.high)};
}
inline __m512 _mm512_unpackhi_ps(__m512 a, __m512 b) {
    return {_mm256_unpackhi_ps(a.low, b.low), _mm256_unpackhi_ps(a.high, b.high)};
}
inline __m512i _mm512_unpacklo_epi16(__m512i a, __m512i b) {
    return {_mm256_unpacklo_epi16(a.low, b.low), _mm256_unpacklo_epi16(a.high, b.high)};
}
inline __m512i _mm512_unpackhi_epi16(__m512i a, __m512i b) {
    return {_mm256_unpackhi_epi16(a.low, b.low), _mm256_unpackhi_epi16(a.high, b.high)};
}

// Two bits of `order` for each of four results: the first two are of a, the others of b. These are
// lanes of each 128 bits, or the 128 bits themselves.
inline __m512 _mm512_shuffle_ps(__m512 a, __m512 b, int order) {
    float x[16], y[16], shuffled[16];
    _mm512_storeu_ps(x, a);
    _mm512_storeu_ps(y, b);
    for (int lane = 0; lane < 16; ++lane) {
        const int from = lane / 4 * 4 + (order >> lane % 4 * 2 & 3);
        shuffled[lane] = lane % 4 < 2 ? x[from] : y[from];
    }
    return _mm512_loadu_ps(shuffled);
}
inline __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int order) {
    float x[16], y[16], shuffled[16];
    _mm512_storeu_ps(x, a);
    _mm512_storeu_ps(y, b);
    for (int quarter = 0; quarter < 4; ++quarter) {
        const float *from = (quarter < 2 ? x : y) + (order >> quarter * 2 & 3) * 4;
        memcpy(shuffled + quarter * 4, from, 4 * sizeof(float));
    }
    return _mm512_loadu_ps(shuffled);
}
