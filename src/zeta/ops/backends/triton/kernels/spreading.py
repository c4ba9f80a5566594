"""An offset bias written out as the tiles that its band cuts: see `Spread`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def spread_kernel(
    vector, reach, unit, out, count, first, step,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, KEY_MAJOR: tl.constexpr,
):  # fmt: skip
    """One tile of a vector (H, 2 * reach + 1): out (H, count, M, N), or with KEY_MAJOR
    (H, count, N, M).
    """
    program = tl.program_id(0)
    local_M = tl.arange(0, BLOCK_M)
    local_N = tl.arange(0, BLOCK_N)
    if KEY_MAJOR:
        offset = local_N[:, None] - local_M[None, :]
        place = local_N[:, None] * BLOCK_M + local_M[None, :]
    else:
        offset = local_N[None, :] - local_M[:, None]
        place = local_M[:, None] * BLOCK_N + local_N[None, :]
    offset += first + program % count * step
    offset = tl.minimum(tl.maximum(offset, -reach), reach)
    tile = tl.load(vector + program // count * (2 * reach + 1) + reach + offset) * unit
    tl.store(out + program.to(tl.int64) * (BLOCK_M * BLOCK_N) + place, tile)
