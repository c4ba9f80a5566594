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
def wait_for_clear(cleared, phase):
    """Until both groups of warps have cleared their part."""
    fence_async_shared()
    meet(cleared, phase)


@gluon.jit
def meet(barrier, phase):
    """Until both groups of warps are here."""
    gl.thread_barrier()
    mbarrier.arrive(barrier, count=1)
    mbarrier.wait(barrier, phase)
