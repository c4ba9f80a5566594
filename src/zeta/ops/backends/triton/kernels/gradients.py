"""The gradient of one tile of scores, from what the forward pass left: shared by every backward
kernel.

Of P the weights, dP the gradient that reaches them and delta its row sums weighted by P:
dS = P * (dP - delta). With dropout, delta holds (1 - p) times that, and every result is divided by
(1 - p) at its end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zeta.ops.backends.triton.kernels.ranges import column_parts
from zeta.ops.backends.triton.kernels.scores import (
    column_hashes,
    exponential,
    kept,
    load_keys,
    load_plane,
    load_rows,
    row_hashes,
    score_tile,
    visible,
)


@triton.jit
def load_statistics(statistics, score, sizes, batch, head, row0, local_M):
    """The normalisers of some rows, in two parts where `exact` (otherwise the second means
    nothing).
    """
    index = (batch * sizes.heads + head) * sizes.queries + row0 + local_M
    inside = row0 + local_M < sizes.queries
    norm_M = tl.load(statistics + index, mask=inside, other=float("inf"))
    rest_M = norm_M
    if score.exact:
        plane = tl.cast(sizes.batch, tl.int64) * sizes.heads * sizes.queries
        rest_M = tl.load(statistics + plane + index, mask=inside, other=0.0)
    return norm_M, rest_M


@triton.jit
def load_delta(delta, sizes, batch, head, row0, local_M):
    index = (batch * sizes.heads + head) * sizes.queries + row0 + local_M
    return tl.load(delta + index, mask=row0 + local_M < sizes.queries, other=0.0)


@triton.jit
def weights_tile(
    dots,
    norm,
    rest,
    score,
    sizes,
    batch,
    head,
    row0,
    column0,
    row,
    column,
    side,
    CLEAN: tl.constexpr,
):
    """The weights of a tile, before dropout, and the derivative of a soft cap. `norm` and `rest`
    broadcast along rows.
    """
    plain: tl.constexpr = (
        (CLEAN or (score.folds and (score.begins or score.offsets is None)))
        and not score.exact and score.softcap is None and score.slopes is None
        and score.dense is None and score.documents is None and score.keep is None
    )  # fmt: skip
    if plain:
        if not CLEAN:
            seen = visible(score, sizes, batch, row0, column0, row, column)
            dots = tl.where(seen, dots, float("-inf"))
        p = tl.exp2(dots * score.scale + (side - norm))
        return p, p
    else:
        s, slope = score_tile(
            dots, score, sizes, batch, head, row0, column0, row, column, side, CLEAN
        )
        p = exponential(s - norm, score)
        if score.exact:
            p = p * rest
        return p, slope


@triton.jit
def load_dweights(dweights, sizes, batch, head, row0, column0, row, column):
    """A tile of the gradient of returned weights; of averaged ones, each head has its share."""
    tile = load_plane(dweights, sizes, batch, head, row0, column0, row, column, 0.0)
    return tile.to(tl.float32)


@triton.jit
def dweights_tile(
    dout_ME, v_NE, dweights, row_hash_M, score, sizes, batch, head, row0, column0, row, column,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Row-major [M, N]: the gradient that reaches the weights, past dropout."""
    if dweights is None:
        dp_MN = tl.dot(dout_ME, tl.trans(v_NE), input_precision=PRECISION)
    else:
        dp_MN = load_dweights(dweights, sizes, batch, head, row0, column0, row, column)
    if score.dropout is not None:
        column_hash_N = column_hashes(score, sizes, batch, column0, tl.arange(0, v_NE.shape[0]))
        keep_MN = kept(score, row_hash_M[:, None], column_hash_N[None, :])
        dp_MN = tl.where(keep_MN, dp_MN, 0.0)
    return dp_MN


@triton.jit
def dscores_tile(
    begin_MN, q_MD, dout_ME, k_ND, v_NE, dweights, norm_M, rest_M, delta_M, row_hash_M, score,
    sizes, batch, head, row0, column0, row, column, side,
    CLEAN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Row-major [M, N]: the gradient of what is added to the scores, and that of the scaled
    products, which begin with `begin_MN`.
    """
    dots_MN = tl.dot(q_MD, tl.trans(k_ND), begin_MN, input_precision=PRECISION)
    p_MN, slope_MN = weights_tile(
        dots_MN, norm_M[:, None], rest_M[:, None], score, sizes, batch, head, row0, column0, row,
        column, side, CLEAN,
    )  # fmt: skip
    dp_MN = dweights_tile(
        dout_ME, v_NE, dweights, row_hash_M, score, sizes, batch, head, row0, column0, row, column,
        PRECISION,
    )  # fmt: skip
    ds_MN = p_MN * (dp_MN - delta_M[:, None])
    added_MN = ds_MN
    if score.softcap is not None:
        ds_MN = ds_MN * slope_MN
        if not score.softcap.first:
            added_MN = ds_MN
    return added_MN, ds_MN


@triton.jit
def delta_kernel(
    out, dout, dlse, delta, sizes, keep, VALUE_WIDTH: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta (B, H, T): the row sums of dP * P, as out . dout, less the gradient of lse; times
    `keep`.
    """
    num_tiles = tl.cdiv(sizes.queries, BLOCK_M)
    program = tl.program_id(0)
    batch_head = program // num_tiles
    row0 = (program % num_tiles) * BLOCK_M
    head = batch_head % sizes.heads
    batch = (batch_head // sizes.heads).to(tl.int64)
    local_M = tl.arange(0, BLOCK_M)
    outer_E = tl.arange(0, BLOCK_E)
    out_ME = load_rows(out, batch, head, row0, local_M, sizes.queries, outer_E, VALUE_WIDTH, False)
    dout_ME = load_rows(
        dout, batch, head, row0, local_M, sizes.queries, outer_E, VALUE_WIDTH, False
    )
    delta_M = tl.sum(out_ME.to(tl.float32) * dout_ME.to(tl.float32), 1)
    index = batch_head.to(tl.int64) * sizes.queries + row0 + local_M
    inside = row0 + local_M < sizes.queries
    if dlse is not None:
        delta_M -= tl.load(dlse + index, mask=inside, other=0.0)
    tl.store(delta + index, delta_M * keep, mask=inside)


@triton.jit
def row_sums_kernel(
    q, k, v, dout, dweights, statistics, dlse, delta, score, sizes,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """delta again, from P and dP themselves: for returned weights, and as exact as they are."""
    num_tiles = tl.cdiv(sizes.queries, BLOCK_M)
    program = tl.program_id(0)
    batch_head = program // num_tiles
    row0 = (program % num_tiles) * BLOCK_M
    head = batch_head % sizes.heads
    key_head = head // sizes.group
    batch = (batch_head // sizes.heads).to(tl.int64)
    local_M = tl.arange(0, BLOCK_M)
    local_N = tl.arange(0, BLOCK_N)
    inner_D = tl.arange(0, BLOCK_D)
    outer_E = tl.arange(0, BLOCK_E)
    row = local_M[:, None]
    column = local_N[None, :]
    q_MD = load_rows(q, batch, head, row0, local_M, sizes.queries, inner_D, WIDTH, False)
    dout_ME = q_MD
    if dweights is None:
        dout_ME = load_rows(
            dout, batch, head, row0, local_M, sizes.queries, outer_E, VALUE_WIDTH, False
        )
    norm_M, rest_M = load_statistics(statistics, score, sizes, batch, head, row0, local_M)
    row_hash_M = row_hashes(score, sizes, batch, head, row0, local_M)
    delta_M = tl.zeros([BLOCK_M], dtype=tl.float32)
    parts = column_parts(score, sizes, batch, row0, BLOCK_M, BLOCK_N)
    low = parts[0]
    high = parts[5]
    for column0 in tl.range(low, high, BLOCK_N):
        k_ND = load_keys(k, score, sizes, batch, key_head, column0, local_N, inner_D, WIDTH, False)
        v_NE = k_ND
        if dweights is None:
            v_NE = load_keys(
                v, score, sizes, batch, key_head, column0, local_N, outer_E, VALUE_WIDTH, False
            )
        dots_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision=PRECISION)
        p_MN, _ = weights_tile(
            dots_MN, norm_M[:, None], rest_M[:, None], score, sizes, batch, head, row0, column0,
            row, column, 0.0, False,
        )  # fmt: skip
        dp_MN = dweights_tile(
            dout_ME, v_NE, dweights, row_hash_M, score, sizes, batch, head, row0, column0, row,
            column, PRECISION,
        )  # fmt: skip
        delta_M += tl.sum(p_MN * dp_MN, 1)
    index = batch_head.to(tl.int64) * sizes.queries + row0 + local_M
    inside = row0 + local_M < sizes.queries
    if dlse is not None:
        keep = 1.0
        if score.dropout is not None:
            keep = score.dropout.keep
        delta_M -= keep * tl.load(dlse + index, mask=inside, other=0.0)
    tl.store(delta + index, delta_M, mask=inside)
