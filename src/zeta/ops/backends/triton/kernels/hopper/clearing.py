"""Zeros where a tile that was fetched whole has no key.

What lies in padding must reach nothing, though its weights are 0.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier


@gluon.jit
def clear_rows(tile_ND, exists_N, LAYOUT: gl.constexpr):
    """Writes 0 to the rows of a tile that are no keys."""
    found_ND = tile_ND.load(LAYOUT)
    tile_ND.store(gl.where(exists_N[:, None], found_ND, gl.zeros_like(found_ND)))


@gluon.jit
def wait_for_clear(cleared):
    """Until both groups of warps have cleared their part, which they do once."""
    fence_async_shared()
    gl.thread_barrier()
    mbarrier.arrive(cleared, count=1)
    mbarrier.wait(cleared, 0)
