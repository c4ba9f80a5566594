// simd.h on AVX-512 (F, BW, DQ, VL): 16 lanes.

constexpr int LANES = 16;
using Floats = __m512;
using Ints = __m512i;  // 32 bits each
struct Mask {
    __mmask16 bits;
};

inline Floats zeros() { return _mm512_setzero_ps(); }
inline Floats splat(float x) { return _mm512_set1_ps(x); }
inline Ints splat_int(int32_t x) { return _mm512_set1_epi32(x); }
inline Ints lane_numbers() {
    return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

inline Floats load(const float *from) { return _mm512_loadu_ps(from); }
inline Floats load(const BFloat16 *from) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
inline Floats load(const Float16 *from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)));
}
inline Floats load(const int8_t *from) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(from));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}
inline Ints load_ints(const int32_t *from) { return _mm512_loadu_si512(from); }
inline Ints load_bytes(const uint8_t *from) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)));
}

// The bfloat16 in the low half of each lane, and in the high half.
inline Floats low_halves(Ints x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
inline Floats high_halves(Ints x) {
    return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(-0x10000)));
}

// Of each lane, two 16-bit numbers: those of a and of b in turn, from the lower or the upper half of
// each 128 bits.
inline Ints interleave_low(Ints a, Ints b) { return _mm512_unpacklo_epi16(a, b); }
inline Ints interleave_high(Ints a, Ints b) { return _mm512_unpackhi_epi16(a, b); }

inline void store(float *to, Floats x) { _mm512_storeu_ps(to, x); }
inline void store_ints(int32_t *to, Ints x) { _mm512_storeu_si512(to, x); }
inline void store(Float16 *to, Floats x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(to),
                        _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// The bits of the nearest bfloat16, ties to even, in the low half of each lane.
#if defined(__AVX512BF16__)
inline Ints round_to_bfloat16(Floats x) {
    return _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
}
#else
inline Ints round_to_bfloat16(Floats x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
}
#endif
// The low halves of the lanes, one after the other.
inline void store_halves(uint16_t *to, Ints x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), _mm512_cvtepi32_epi16(x));
}
inline void store(BFloat16 *to, Floats x) { store_halves(&to->bits, round_to_bfloat16(x)); }

inline Mask first_lanes(int64_t count) {
    const uint32_t bits = count <= 0 ? 0 : count >= LANES ? 0xffff : (1u << count) - 1;
    return {static_cast<__mmask16>(bits)};
}
inline Floats load_masked(const float *from, Mask mask) {
    return _mm512_maskz_loadu_ps(mask.bits, from);
}
inline void store_masked(float *to, Floats x, Mask mask) {
    _mm512_mask_storeu_ps(to, mask.bits, x);
}

#if defined(ZETA_EMULATE)
inline void keep_in_register(Floats &) {}  // It is two.
#else
inline void keep_in_register(Floats &x) { __asm__("" : "+v"(x)); }
#endif

inline void prefetch(const void *from) { __builtin_prefetch(from); }

inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats multiply_subtract(Floats a, Floats b, Floats c) { return _mm512_fmsub_ps(a, b, c); }
// The second where either is NaN, as the processor has it.
inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats abs(Floats x) { return _mm512_andnot_ps(splat(-0.0f), x); }
inline Floats to_floats(Ints x) { return _mm512_cvtepi32_ps(x); }

inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Ints subtract(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
inline Ints multiply(Ints a, Ints b) { return _mm512_mullo_epi32(a, b); }
inline Ints exclusive_or(Ints a, Ints b) { return _mm512_xor_si512(a, b); }
inline Ints as_ints(Floats x) { return _mm512_castps_si512(x); }
inline Floats as_floats(Ints x) { return _mm512_castsi512_ps(x); }
inline Ints either_bits(Ints a, Ints b) { return _mm512_or_si512(a, b); }
inline Ints min(Ints a, Ints b) { return _mm512_min_epi32(a, b); }
inline Ints max(Ints a, Ints b) { return _mm512_max_epi32(a, b); }
template <int BITS>
inline Ints shift_right(Ints x) {
    return _mm512_srli_epi32(x, BITS);
}
template <int BITS>
inline Ints shift_left(Ints x) {
    return _mm512_slli_epi32(x, BITS);
}
inline Floats gather(const float *from, Ints index) { return _mm512_i32gather_ps(index, from, 4); }

inline Mask less(Floats a, Floats b) { return {_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ)}; }
inline Mask not_less(Floats a, Floats b) { return {_mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ)}; }
inline Mask greater(Ints a, Ints b) { return {_mm512_cmpgt_epi32_mask(a, b)}; }
// Which of LANES 64-bit numbers equal one.
inline Mask equal_long(const int64_t *from, int64_t x) {
    const __m512i wanted = _mm512_set1_epi64(x);
    const uint32_t low = _mm512_cmpeq_epi64_mask(_mm512_loadu_si512(from), wanted);
    const uint32_t high = _mm512_cmpeq_epi64_mask(_mm512_loadu_si512(from + 8), wanted);
    return {static_cast<__mmask16>(low | high << 8)};
}
inline Mask both(Mask a, Mask b) { return {static_cast<__mmask16>(a.bits & b.bits)}; }
inline Mask either(Mask a, Mask b) { return {static_cast<__mmask16>(a.bits | b.bits)}; }
inline bool any(Mask a) { return a.bits != 0; }
inline Floats select(Mask mask, Floats yes, Floats no) {
    return _mm512_mask_blend_ps(mask.bits, no, yes);
}
inline Floats unless(Mask mask, Floats no) {
    return _mm512_maskz_mov_ps(static_cast<__mmask16>(~mask.bits), no);
}

inline float largest(Floats x) { return _mm512_reduce_max_ps(x); }
inline float sum(Floats x) { return _mm512_reduce_add_ps(x); }

// y * 2^whole, of a y near 1 and a whole of at most 127: 0 where whole is under -126.
inline Floats times_power_of_two(Floats y, Floats whole) {
    const __mmask16 kept = _mm512_cmp_ps_mask(whole, splat(-126.0f), _CMP_NLT_UQ);
    return _mm512_maskz_scalef_ps(kept, y, whole);
}

// Lanes 1, 0, 3, 2, ...
inline Floats swap_pairs(Floats x) { return _mm512_shuffle_ps(x, x, 0xb1); }

// Rows of LANES numbers become columns.
inline void transpose(Floats *rows) {
    Floats a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
        a[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        b[i] = _mm512_shuffle_ps(a[i], a[i + 2], 0x44);
        b[i + 1] = _mm512_shuffle_ps(a[i], a[i + 2], 0xee);
        b[i + 2] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0x44);
        b[i + 3] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
        a[i] = _mm512_shuffle_f32x4(b[i], b[i + 4], 0x88);
        a[i + 4] = _mm512_shuffle_f32x4(b[i], b[i + 4], 0xdd);
        a[i + 8] = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0x88);
        a[i + 12] = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; ++i) {
        rows[i] = _mm512_shuffle_f32x4(a[i], a[i + 8], 0x88);
        rows[i + 8] = _mm512_shuffle_f32x4(a[i], a[i + 8], 0xdd);
    }
}

// Lane i is the sum of the lanes of rows[i].
inline Floats sums_of_lanes(const Floats *rows) {
    Floats a[8], b[4], c[2];
    // Quarters 0 and 1 of a vector are of one row, 2 and 3 of the other.
    unrolled<8>([&](auto i) {
        // So that quarter q of b[p] is of row 4 q + p.
        const Floats x = rows[i % 2 * 8 + i / 2], y = rows[i % 2 * 8 + 4 + i / 2];
        a[i] = _mm512_mask_blend_ps(0xff00, x, y) + _mm512_shuffle_f32x4(x, y, 0x4e);
    });
    unrolled<4>([&](auto i) {
        b[i] = _mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0x88) +
               _mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0xdd);
    });
    unrolled<2>([&](auto i) {
        c[i] = _mm512_mask_blend_ps(0xcccc, b[2 * i], b[2 * i + 1]) +
               _mm512_shuffle_ps(b[2 * i], b[2 * i + 1], 0x4e);
    });
    return _mm512_shuffle_ps(c[0], c[1], 0x88) + _mm512_shuffle_ps(c[0], c[1], 0xdd);
}
