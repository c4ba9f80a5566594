// The kernels in AVX-512 (F, BW, DQ, VL). With -DZETA_EMULATE software stands in for it, here and in the
// units that build on it.

#include <immintrin.h>
#include <math.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "table.h"

#define ZETA_TILE_KEYS 384

namespace zeta_avx512 {
#include "kernels.h"
#include "fma_passes.h"
}

extern "C" const ZetaPasses zeta_passes_avx512 = {
    zeta_avx512::forward,
    zeta_avx512::backward,
    zeta_avx512::weights,
    zeta_avx512::decode,
    zeta_avx512::project,
    zeta_avx512::rotate,
};
