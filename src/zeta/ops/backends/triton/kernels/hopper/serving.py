"""What two warps of the backward pass on Hopper do, so that the others need not: fetch, and add.

M: query rows of a tile, N: key columns of a tile, S: stages, D: padded width.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

LAST: gl.constexpr = gl.constexpr(2**31 - 1)
"""A position after every other."""


@gluon.jit
def fetch(
    q, k, v, dout, norms, deltas, hashes, tiles, bars, sizes, batch, key_head, column0, parts,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fetches a tile of keys and values, then tiles of rows, last first, as places become free."""
    q_SMD, k_ND, v_ND, dout_SMD, norms_SM, deltas_SM, hashes_SM, _, _ = tiles
    fetched, _, full, empty, _, _, _ = bars
    low, _, _, _, _, high = parts
    mbarrier.expect(fetched, 2 * BLOCK_N * BLOCK_D * 2)
    wide: gl.constexpr = [1, 1, BLOCK_N, BLOCK_D]
    tma.async_copy_global_to_shared(
        k, [batch, key_head, column0, 0], fetched, k_ND._reinterpret(k.dtype, wide, k.layout)
    )
    tma.async_copy_global_to_shared(
        v, [batch, key_head, column0, 0], fetched, v_ND._reinterpret(v.dtype, wide, v.layout)
    )
    num_tiles = gl.cdiv(high - low, BLOCK_M)
    step = low * 0
    for member in range(sizes.group):
        head = key_head * sizes.group + member
        for index in range(num_tiles):
            row0 = low + (num_tiles - 1 - index) * BLOCK_M
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            bar = full.index(stage)
            numbers: gl.constexpr = 2 if hashes is None else 3
            mbarrier.expect(bar, 2 * BLOCK_M * BLOCK_D * 2 + numbers * BLOCK_M * 4)
            tall: gl.constexpr = [1, 1, BLOCK_M, BLOCK_D]
            tma.async_copy_global_to_shared(
                q, [batch, head, row0, 0], bar,
                q_SMD.index(stage)._reinterpret(q.dtype, tall, q.layout),
            )  # fmt: skip
            plane = batch * sizes.heads + head
            tma.async_copy_global_to_shared(norms, [plane, row0], bar, norms_SM.index(stage))
            tma.async_copy_global_to_shared(
                dout, [batch, head, row0, 0], bar,
                dout_SMD.index(stage)._reinterpret(dout.dtype, tall, dout.layout),
            )  # fmt: skip
            tma.async_copy_global_to_shared(deltas, [plane, row0], bar, deltas_SM.index(stage))
            if hashes is not None:
                tma.async_copy_global_to_shared(hashes, [plane, row0], bar, hashes_SM.index(stage))
            step += 1


@builtin
def add_to_global(descriptor, coordinates, source, _semantic=None):
    """Adds a tile of shared memory to a tensor, by the copy engine: Gluon has no name for it."""
    places = _semantic._convert_to_ir_values(coordinates, require_i64=False)
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, descriptor.handle, places, source.handle)


@gluon.jit
def tell(own, finished, PENDING: gl.constexpr):
    """Tells the next program how far this one has come, once what it added has arrived, but for
    the last tile where PENDING. One lane adds and another may tell: all of them wait.
    """
    if PENDING:
        finished = gl.inline_asm_elementwise(
            "cp.async.bulk.wait_group 1; bar.warp.sync 0xffffffff; mov.b32 $0, $1;",
            "=r,r",
            [finished],
            gl.int32,
            False,
            1,
        )
    else:
        finished = gl.inline_asm_elementwise(
            "cp.async.bulk.wait_group 0; bar.warp.sync 0xffffffff; mov.b32 $0, $1;",
            "=r,r",
            [finished],
            gl.int32,
            False,
            1,
        )
    gl.atomic_xchg(own, finished, sem="release", scope="gpu")


@gluon.jit
def add(
    sums, tiles, bars, own, follows, sizes, batch, key_head, parts,
    BLOCK_M: gl.constexpr, BLOCK_D: gl.constexpr,
):  # fmt: skip
    """Adds what each tile of rows gives to the queries, when all have whose turn is earlier."""
    dq_MD = tiles[8]
    _, _, _, _, _, written, taken = bars
    low, _, _, _, _, high = parts
    num_tiles = gl.cdiv(high - low, BLOCK_M)
    finished = low * 0
    step = low * 0
    for member in range(sizes.group):
        head = key_head * sizes.group + member
        last = (member + 1) * gl.cdiv(sizes.queries, BLOCK_M) - 1
        for index in range(num_tiles):
            row0 = low + (num_tiles - 1 - index) * BLOCK_M
            position = last - row0 // BLOCK_M
            # Read early: where the one before is ahead, as mostly, nothing waits for it.
            seen = gl.load(own - 1, mask=follows, other=LAST, volatile=True)
            mbarrier.wait(written, step & 1)
            while seen <= position:
                seen = gl.load(own - 1, volatile=True)
            tile: gl.constexpr = [1, BLOCK_M, BLOCK_D]
            add_to_global(
                sums, [batch * sizes.heads + head, row0, 0],
                dq_MD._reinterpret(gl.float32, tile, sums.layout),
            )  # fmt: skip
            tma.store_wait(0)
            mbarrier.arrive(taken, count=1)
            # To wait for this tile at once would take longer.
            tell(own, finished, True)
            finished = position + 1
            step += 1
    tell(own, finished, False)
