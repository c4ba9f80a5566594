// The tile registers of AMX, behind five functions; with -DZETA_EMULATE software does what
// they do, so that all that is built on them runs on any processor.
//
// There are eight tiles of 16 rows of 64 bytes: 16 x 16 float32 of C, 16 x 32 bfloat16 of A, or
// 32 x 16 of B, whose rows 2k and 2k + 1 lie side by side in one row of the tile, pair by pair.

#if defined(ZETA_EMULATE)

static thread_local uint32_t emulated_tiles[8][16][16];

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

template <int C, int A, int B>
inline void multiply_tiles() {
    for (int row = 0; row < 16; ++row) {
        float sums[16], left[32], right[32];
        memcpy(sums, emulated_tiles[C][row], sizeof sums);
        for (int pair = 0; pair < 16; ++pair) {
            const uint32_t a = emulated_tiles[A][row][pair];
            const uint32_t even = a << 16, odd = a & 0xffff0000u;
            memcpy(left, &even, 4);
            memcpy(left + 1, &odd, 4);
            for (int column = 0; column < 16; ++column) {
                const uint32_t b = emulated_tiles[B][pair][column];
                const uint32_t low = b << 16, high = b & 0xffff0000u;
                memcpy(right, &low, 4);
                memcpy(right + 1, &high, 4);
                sums[column] += left[0] * right[0];
                sums[column] += left[1] * right[1];
            }
        }
        memcpy(emulated_tiles[C][row], sums, sizeof sums);
    }
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
