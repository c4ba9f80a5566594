// All kernels, in the order in which they build on each other. A unit includes this inside its own
// namespace, so that a function compiled for one instruction set never stands in for the same
// function of another; no kernel includes another, and none uses a class of C++'s library. A unit whose
// processor multiplies pairs of bfloat16 by vectors says so with ZETA_HAS_PAIRS, and one that is fastest with
// other tiles of keys with ZETA_TILE_KEYS.

#if !defined(ZETA_TILE_KEYS)
#define ZETA_TILE_KEYS 256
#endif

#include "simd.h"
#include "threads.h"
#include "scratch.h"
#include "products.h"
#include "dropout.h"
#include "sight.h"
#include "stairs.h"
#include "operands.h"
#include "fma_operands.h"
#include "short_rows.h"
#include "few_operands.h"
#include "scores.h"
#include "forward.h"
#include "turns.h"
#include "band.h"
#include "dense_gradient.h"
#include "row_sums.h"
#include "backward_block.h"
#include "backward_rows.h"
#include "backward_task.h"
#include "backward.h"
#if defined(ZETA_HAS_PAIRS)
#include "paired_rows.h"
#endif
#include "decode.h"
#include "projection.h"
#include "rotation.h"
#include "weights.h"
