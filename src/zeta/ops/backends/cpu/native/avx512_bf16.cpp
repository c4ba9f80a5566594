// The kernels in AVX-512 with products of bfloat16 (BF16).

#include <immintrin.h>
#include <math.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "table.h"

#define ZETA_HAS_PAIRS

namespace zeta_avx512_bf16 {
#include "kernels.h"
#include "pairs.h"
#include "dot_products.h"
#include "pair_operands.h"
#include "dot_passes.h"
}

extern "C" const ZetaPasses zeta_passes_avx512_bf16 = {
    zeta_avx512_bf16::forward,
    zeta_avx512_bf16::backward,
    zeta_avx512_bf16::weights,
    zeta_avx512_bf16::decode,
    zeta_avx512_bf16::project,
    zeta_avx512_bf16::rotate,
};
