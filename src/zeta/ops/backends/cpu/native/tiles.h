// The tile registers of AMX, behind five functions; with -DZETA_EMULATE software does what
// they do, so that all that is built on them runs on any processor.
//
// There are eight tiles of 16 rows of 64 bytes: 16 x 16 float32 of C, 16 x 32 bfloat16 of A, or
// 32 x 16 of B, whose rows 2k and 2k + 1 lie side by side in one row of the tile, pair by pair.

#if defined(ZETA_EMULATE)

static thread_local float emulated_tiles[8][16][16];

inline void configure_tiles() {}
inline void release_tiles() {}

template <int TILE>
inline void zero_tile() {
    memset(emulated_tiles[TILE], 0, sizeof emulated_tiles[TILE]);
}

template <int TILE>
inline void load_tile(const void *from, int64_t stride_bytes) {
    for (int row = 0; row < 16; ++row)
        memcpy(emulated_tiles[TILE][row], static_cast<const char *>(from) + row * stride_bytes, 64);
}

template <int TILE>
inline void store_tile(void *to, int64_t stride_bytes) {
    for (int row = 0; row < 16; ++row)
        memcpy(static_cast<char *>(to) + row * stride_bytes, emulated_tiles[TILE][row], 64);
}

// As the processor does it: a chain of fused multiply-adds for each number of a pair, from zero, then
// one addition to C; denormal numbers are zero.
template <int C, int A, int B>
inline void multiply_tiles() {
    const uint32_t mode = _mm_getcsr();
    _mm_setcsr(mode | _MM_FLUSH_ZERO_ON | _MM_DENORMALS_ZERO_ON);
    for (int row = 0; row < 16; ++row) {
        float *sums = emulated_tiles[C][row];
        Floats even = zeros(), odd = zeros();
        for (int pair = 0; pair < 16; ++pair) {
            const Ints a = as_ints(splat(emulated_tiles[A][row][pair]));
            const Ints b = as_ints(load(emulated_tiles[B][pair]));
            even = fma(low_halves(a), low_halves(b), even);
            odd = fma(high_halves(a), high_halves(b), odd);
        }
        store(sums, load(sums) + (even + odd));
    }
    _mm_setcsr(mode);
}

#else

inline void configure_tiles() {
    // First the palette; from 16 on the bytes in a row, from 48 on the rows.
    alignas(64) uint8_t description[64] = {1};
    for (int tile = 0; tile < 8; ++tile) {
        description[16 + 2 * tile] = 64;
        description[48 + tile] = 16;
    }
    asm volatile("ldtilecfg %0" ::"m"(description));
}

inline void release_tiles() { asm volatile("tilerelease" ::: "memory"); }

template <int TILE>
inline void zero_tile() {
    asm volatile("tilezero %%tmm%c0" ::"i"(TILE));
}

// These say that they read or write memory, which the compilers' own functions do not.
template <int TILE>
inline void load_tile(const void *from, int64_t stride_bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride_bytes), "i"(TILE)
                 : "memory");
}

template <int TILE>
inline void store_tile(void *to, int64_t stride_bytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride_bytes), "i"(TILE)
                 : "memory");
}

template <int C, int A, int B>
inline void multiply_tiles() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#endif

// What a thread needs to make products: tiles are its own, and taken only as long as they are needed.
class ProductSession {
  public:
    ProductSession() { configure_tiles(); }
    ~ProductSession() { release_tiles(); }
    ProductSession(const ProductSession &) = delete;
    ProductSession &operator=(const ProductSession &) = delete;
};
