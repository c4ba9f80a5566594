// The kernels on AMX tiles, and AVX-512 between them.

#include <immintrin.h>
#include <math.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "table.h"

namespace zeta_amx {
#include "kernels.h"
#include "pairs.h"
#include "tiles.h"
#include "tile_products.h"
#include "pair_operands.h"
#include "tile_passes.h"
}

extern "C" const ZetaPasses zeta_passes_amx = {
    zeta_amx::forward,
    zeta_amx::backward,
    zeta_amx::weights,
    zeta_amx::decode,
    zeta_amx::project,
    zeta_amx::rotate,
};
