// The kernels in AVX2, FMA and F16C.

#include <immintrin.h>
#include <math.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "table.h"

namespace zeta_avx2 {
#include "kernels.h"
#include "fma_passes.h"
}

extern "C" const ZetaPasses zeta_passes_avx2 = {
    zeta_avx2::forward,
    zeta_avx2::backward,
    zeta_avx2::weights,
    zeta_avx2::decode,
    zeta_avx2::project,
    zeta_avx2::rotate,
};
