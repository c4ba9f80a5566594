// What each unit (avx2.cpp, avx512.cpp, ...) exports, and what library.cpp offers to it.
//
// A unit defines its table as
//
//     extern "C" const ZetaPasses zeta_passes_avx2 = {forward, backward, weights, decode, project, rotate};
//
// The tables are weak here: a unit whose instructions the compiler does not know is left out of the
// library, and so are those after it, which hand on to it what they do no better.
#pragma once

#include <stdint.h>

#include "abi.h"
#include "messages.h"

#define ZETA_EXPORT __attribute__((visibility("default")))

#ifdef __GLIBC__
// The oldest of their versions, so that a wheel runs on older systems than it was built on.
__asm__(".symver log, log@GLIBC_2.2.5");
#endif

extern "C" {

typedef int64_t (*ZetaPass)(const ZetaCall *call);  // answers with a ZetaAnswer

// Linear layers of the same few rows: out = x weight^T + bias. Features are contiguous.
enum { ZETA_MOST_LAYERS = 3, ZETA_MOST_ROWS = 64 };

typedef struct {
    const void *weight, *bias;  // (features, width) and (features); bias is null where there is none
    void *out;                  // (rows, features)
    int64_t weight_row, features;
} ZetaLayer;

typedef struct {
    int64_t dtype, num_threads;
    int64_t rows, width;
    const void *x;  // (rows, width)
    int64_t num_layers;
    ZetaLayer layers[ZETA_MOST_LAYERS];
} ZetaProjection;

typedef int64_t (*ZetaProject)(const ZetaProjection *call);

// Rotations of pairs of features, all of one dtype and of as many features.
enum { ZETA_MOST_TURNED = 2 };

// (batch, length, pairs), the pairs contiguous; a stride is 0 where the table is broadcast.
typedef struct {
    const float *data;
    int64_t batch, row;
} ZetaAngles;

typedef struct {
    ZetaRows from, to;  // which do not overlap
    int64_t batch, heads, length;
    ZetaAngles cos, sin;
} ZetaTurned;

typedef struct {
    int64_t dtype, num_threads;
    int64_t head_dim, pairs;
    int64_t interleaved;  // features 2p and 2p + 1 are a pair; else p and p + pairs
    int64_t inverse;      // by the negative angles
    int64_t num_turned;
    ZetaTurned turned[ZETA_MOST_TURNED];
} ZetaRotation;

typedef int64_t (*ZetaRotate)(const ZetaRotation *call);

typedef struct {
    ZetaPass forward, backward, weights, decode;
    ZetaProject project;
    ZetaRotate rotate;
} ZetaPasses;

extern __attribute__((weak, visibility("hidden"))) const ZetaPasses zeta_passes_avx2;
extern __attribute__((weak, visibility("hidden"))) const ZetaPasses zeta_passes_avx512;
extern __attribute__((weak, visibility("hidden"))) const ZetaPasses zeta_passes_avx512_bf16;
extern __attribute__((weak, visibility("hidden"))) const ZetaPasses zeta_passes_amx;

// The passes of the instruction set that so many multiplications run on; null where none can run.
__attribute__((visibility("hidden"))) const ZetaPasses *zeta_passes(double multiplications);

// Runs `body(data)` on `num_threads` threads of torch's own pool, the caller's among them; on the
// caller's alone in a forked child, whose pool has no threads. Compiled for any x86-64 processor.
__attribute__((visibility("hidden"))) void zeta_parallel(
    void (*body)(void *data), void *data, int64_t num_threads);

}  // extern "C"
