"""Attention weights, recomputed from the normalisers: per head, or averaged with the heads looped
inside.

M: query rows of a tile, N: key columns of a tile, D: padded width of keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zeta.ops.backends.triton.kernels.gradients import (
    load_statistics,
    weights_tile,
)
from zeta.ops.backends.triton.kernels.ranges import column_parts
from zeta.ops.backends.triton.kernels.scores import load_keys, load_rows


@triton.jit
def head_weights(
    q, k, statistics, score, sizes, batch, head, row0, column0, local_M, local_N,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    inner_D = tl.arange(0, BLOCK_D)
    q_MD = load_rows(q, batch, head, row0, local_M, sizes.queries, inner_D, WIDTH, False)
    k_ND = load_keys(
        k, score, sizes, batch, head // sizes.group, column0, local_N, inner_D, WIDTH, False
    )
    norm_M, rest_M = load_statistics(statistics, score, sizes, batch, head, row0, local_M)
    dots_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision=PRECISION)
    p_MN, _ = weights_tile(
        dots_MN, norm_M[:, None], rest_M[:, None], score, sizes, batch, head, row0, column0,
        local_M[:, None], local_N[None, :], 0.0, False,
    )  # fmt: skip
    return p_MN


@triton.jit
def weights_kernel(
    q, k, statistics, out, score, sizes,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """A tile of weights: out (B, H, T, S), or with MEAN (B, T, S), the average over heads."""
    num_rows = tl.cdiv(sizes.queries, BLOCK_M)
    num_columns = tl.cdiv(sizes.keys, BLOCK_N)
    program = tl.program_id(0)
    column0 = (program % num_columns) * BLOCK_N
    program = program // num_columns
    row0 = (program % num_rows) * BLOCK_M
    program = program // num_rows
    local_M = tl.arange(0, BLOCK_M)
    local_N = tl.arange(0, BLOCK_N)
    heads = 1
    if MEAN:
        heads = sizes.heads
    plane = program.to(tl.int64)
    batch = plane * heads // sizes.heads
    first = program * heads % sizes.heads
    parts = column_parts(score, sizes, batch, row0, BLOCK_M, BLOCK_N)
    low = parts[0]
    high = parts[5]
    seen = (column0 < high) & (column0 + BLOCK_N > low)
    p_MN = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for member in tl.range(0, tl.where(seen, heads, 0)):
        p_MN += head_weights(
            q, k, statistics, score, sizes, batch, first + member, row0, column0, local_M, local_N,
            WIDTH, BLOCK_D, PRECISION,
        )  # fmt: skip
    if MEAN:
        p_MN = p_MN / sizes.heads
    base = out + (plane * sizes.queries + row0) * sizes.keys + column0
    inside = (row0 + local_M < sizes.queries)[:, None] & (column0 + local_N < sizes.keys)[None, :]
    tl.store(
        base + local_M[:, None].to(tl.int64) * sizes.keys + local_N[None, :],
        p_MN.to(out.dtype.element_ty),
        mask=inside,
    )
