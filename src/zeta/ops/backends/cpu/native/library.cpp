// The library's entry points: which instruction set runs, and on which threads.
//
// This unit is compiled for any x86-64 processor, and nothing in it may be shared with those that
// are not. Nothing here or there needs the C++ library: a wheel must run beside any.

#include <cpuid.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "work.h"

// Of libgomp, and of Intel's and LLVM's OpenMP too: that of torch, which is there before this library.
// Weak, it is null where there is none.
extern "C" __attribute__((weak)) void GOMP_parallel(
    void (*body)(void *data), void *data, unsigned num_threads, unsigned flags);

// What the compiler calls to destroy an object of a thread; the C++ library only passes it on.
extern "C" int __cxa_thread_atexit_impl(void (*destroy)(void *), void *object, void *library);
extern "C" __attribute__((visibility("hidden"))) int __cxa_thread_atexit(
    void (*destroy)(void *), void *object, void *library) {
    return __cxa_thread_atexit_impl(destroy, object, library);
}

namespace {

bool is_forked = false;

__attribute__((constructor)) void watch_forks() {
    pthread_atfork(nullptr, nullptr, [] { is_forked = true; });
}

struct Registers {
    unsigned a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(unsigned leaf, unsigned part) {
    Registers found;
    __get_cpuid_count(leaf, part, &found.a, &found.b, &found.c, &found.d);
    return found;
}

// Which registers the system saves when it switches threads.
uint64_t saved_registers() {
    if (!(cpuid(1, 0).c & bit_OSXSAVE)) return 0;
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (static_cast<uint64_t>(high) << 32) | low;
}

bool all(uint64_t found, uint64_t wanted) { return (found & wanted) == wanted; }

bool has_avx2(uint64_t saved) {
    const unsigned wanted = bit_FMA | bit_F16C | bit_AVX;
    return all(saved, 0x6) && all(cpuid(1, 0).c, wanted) && all(cpuid(7, 0).b, bit_AVX2);
}

// Vectors of 512 bits slow these processors down for most of a millisecond, and with them all code of the
// caller's: Skylake-SP, Cascade Lake and Cooper Lake, which are family 6, model 85.
bool has_slow_wide_vectors() {
    const unsigned signature = cpuid(1, 0).a;
    const unsigned family = signature >> 8 & 0xf;
    const unsigned model = (signature >> 12 & 0xf0) | (signature >> 4 & 0xf);
    return family == 6 && model == 85;
}

#ifdef ZETA_EMULATE
bool has_avx512(uint64_t saved) { return has_avx2(saved); }
bool has_avx512_bf16(uint64_t saved) { return has_avx2(saved); }
bool has_amx(uint64_t saved) { return has_avx2(saved); }
#else
bool has_avx512(uint64_t saved) {
    const unsigned wanted = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // F, DQ, BW, VL
    return has_avx2(saved) && all(saved, 0xe6) && all(cpuid(7, 0).b, wanted);
}

bool has_avx512_bf16(uint64_t saved) {
    return has_avx512(saved) && all(cpuid(7, 1).a, 1u << 5);
}

// Linux gives a process the tile registers when it asks for them.
bool ask_for_tiles() {
    const long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

bool has_amx(uint64_t saved) {
    const unsigned wanted = 1u << 22 | 1u << 24;  // AMX-BF16, AMX-TILE
    return has_avx512_bf16(saved) && all(saved, 0x60000) && all(cpuid(7, 0).d, wanted) &&
           ask_for_tiles();
}
#endif

constexpr int64_t IS_KNOWN = 1 << 0, HAS_SLOW_WIDE_VECTORS = 1 << 8;  // beside ZetaIsa's bits

int64_t look_at_processor() {
    const uint64_t saved = saved_registers();
    int64_t found = IS_KNOWN | (has_slow_wide_vectors() ? HAS_SLOW_WIDE_VECTORS : 0);
    if (has_avx2(saved)) found |= 1 << ZETA_AVX2;
    if (has_avx512(saved)) found |= 1 << ZETA_AVX512;
    if (has_avx512_bf16(saved)) found |= 1 << ZETA_AVX512_BF16;
    if (has_amx(saved)) found |= 1 << ZETA_AMX;
    return found;
}

int64_t processor() {
    // Whoever comes first finds the same.
    static int64_t known = 0;
    int64_t found = __atomic_load_n(&known, __ATOMIC_RELAXED);
    if (!found) {
        found = look_at_processor();
        __atomic_store_n(&known, found, __ATOMIC_RELAXED);
    }
    return found;
}

// Up to so many multiplications do without such vectors.
constexpr double FEW_MULTIPLICATIONS = 1 << 18;

// In the order of ZetaIsa.
const ZetaPasses *const tables[] = {
    nullptr, &zeta_passes_avx2, &zeta_passes_avx512, &zeta_passes_avx512_bf16, &zeta_passes_amx};

int64_t in_use = ZETA_BEST;

int64_t run(const ZetaCall *call, ZetaPass ZetaPasses::*pass) {
    if (call->bytes != sizeof(ZetaCall)) return ZETA_OTHER_VERSION;
    const ZetaPasses *passes = zeta_passes(count_multiplications(*call));
    return passes ? (passes->*pass)(call) : ZETA_NO_PROCESSOR;
}

}  // namespace

const ZetaPasses *zeta_passes(double multiplications) {
    return tables[zeta_used_for(multiplications)];
}

void zeta_parallel(void (*body)(void *data), void *data, int64_t num_threads) {
    if (num_threads < 2 || is_forked || !GOMP_parallel) return body(data);
    GOMP_parallel(body, data, static_cast<unsigned>(num_threads), 0);
}

extern "C" {

ZETA_EXPORT int64_t zeta_processor(void) {
    return processor() & ~(IS_KNOWN | HAS_SLOW_WIDE_VECTORS);
}

ZETA_EXPORT int64_t zeta_built(void) {
    int64_t found = 0;
    for (int isa = ZETA_AVX2; isa <= ZETA_AMX; ++isa)
        if (tables[isa]) found |= 1 << isa;
    return found;
}

ZETA_EXPORT int64_t zeta_instruction_sets(void) { return zeta_processor() & zeta_built(); }

ZETA_EXPORT int64_t zeta_abi_bytes(void) { return sizeof(ZetaCall); }

ZETA_EXPORT int64_t zeta_use(int64_t isa) {
    const int64_t usable = zeta_instruction_sets() | 1 << ZETA_BEST;
    if (isa < ZETA_BEST || isa > ZETA_AMX || !(usable >> isa & 1)) return 0;
    __atomic_store_n(&in_use, isa, __ATOMIC_RELAXED);
    return 1;
}

ZETA_EXPORT int64_t zeta_used_for(double multiplications) {
    int64_t isa = __atomic_load_n(&in_use, __ATOMIC_RELAXED);
    if (isa != ZETA_BEST) return isa;
    const int64_t usable = zeta_instruction_sets();
    const bool is_slow = processor() & HAS_SLOW_WIDE_VECTORS;
    isa = is_slow && multiplications <= FEW_MULTIPLICATIONS ? ZETA_AVX2 : ZETA_AMX;
    while (isa > ZETA_BEST && !(usable >> isa & 1)) --isa;
    return isa;
}

ZETA_EXPORT int64_t zeta_forward(const ZetaCall *call) { return run(call, &ZetaPasses::forward); }

ZETA_EXPORT int64_t zeta_backward(const ZetaCall *call) { return run(call, &ZetaPasses::backward); }

ZETA_EXPORT int64_t zeta_weights(const ZetaCall *call) { return run(call, &ZetaPasses::weights); }

ZETA_EXPORT int64_t zeta_decode(const ZetaCall *call) { return run(call, &ZetaPasses::decode); }

}  // extern "C"
