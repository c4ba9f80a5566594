"""Gradients of additive biases, with what they are broadcast over summed inside a program.

M: query rows of a tile, N: key columns of a tile, D and E: padded widths of keys and of values.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zeta.ops.backends.triton.kernels.gradients import (
    dscores_tile,
    load_delta,
    load_statistics,
)
from zeta.ops.backends.triton.kernels.scores import begin_products, load_keys, load_rows, row_hashes


@triton.jit
def add_tile(
    acc_MN, begin_MN, q, k, v, dout, dweights, statistics, delta, score, sizes, batch, head, row0,
    column0,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the gradient of what is added to the scores of one tile, of one batch entry and head,
    whose products begin with `begin_MN`.
    """
    local_M = tl.arange(0, acc_MN.shape[0])
    local_N = tl.arange(0, acc_MN.shape[1])
    inner_D = tl.arange(0, BLOCK_D)
    outer_E = tl.arange(0, BLOCK_E)
    key_head = head // sizes.group
    q_MD = load_rows(q, batch, head, row0, local_M, sizes.queries, inner_D, WIDTH, False)
    k_ND = load_keys(k, score, sizes, batch, key_head, column0, local_N, inner_D, WIDTH, False)
    dout_ME = q_MD
    v_NE = k_ND
    if dweights is None:
        dout_ME = load_rows(
            dout, batch, head, row0, local_M, sizes.queries, outer_E, VALUE_WIDTH, False
        )
        v_NE = load_keys(
            v, score, sizes, batch, key_head, column0, local_N, outer_E, VALUE_WIDTH, False
        )
    norm_M, rest_M = load_statistics(statistics, score, sizes, batch, head, row0, local_M)
    delta_M = load_delta(delta, sizes, batch, head, row0, local_M)
    row_hash_M = row_hashes(score, sizes, batch, head, row0, local_M)
    added_MN, _ = dscores_tile(
        begin_MN, q_MD, dout_ME, k_ND, v_NE, dweights, norm_M, rest_M, delta_M, row_hash_M, score,
        sizes, batch, head, row0, column0, local_M[:, None], local_N[None, :], 0.0, False,
        PRECISION,
    )  # fmt: skip
    return acc_MN + added_MN


@triton.jit
def band_kernel(
    q, k, v, dout, dweights, statistics, delta, tiles, score, sizes, num_diagonals, num_splits,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums the band of dS along its diagonals of tiles.

    All tiles at one distance from the main diagonal hold the same offsets in the same places, so
    that one accumulator takes them all, of every batch entry: tiles (H, num_diagonals, num_splits,
    M, N), fp32.
    """
    program = tl.program_id(0)
    split = program % num_splits
    diagonal = (program // num_splits) % num_diagonals
    head = program // (num_splits * num_diagonals)
    num_rows = tl.cdiv(sizes.queries, BLOCK_M)
    work = num_rows * sizes.batch
    share = tl.cdiv(work, num_splits)
    shift = sizes.keys - sizes.queries - score.offsets.reach + 1 + diagonal * BLOCK_N
    begin_MN = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    acc_MN = begin_MN
    if score.begins:
        # The same in every tile of the diagonal.
        local_M = tl.arange(0, BLOCK_M)
        local_N = tl.arange(0, BLOCK_N)
        begin_MN = begin_products(
            score, sizes, 0, head, 0, shift, local_M[:, None], local_N[None, :]
        )
    for item in tl.range(split * share, tl.minimum(split * share + share, work)):
        batch = tl.cast(item // num_rows, tl.int64)
        row0 = (item % num_rows) * BLOCK_M
        # Not under a condition, though some tiles have no key: loads under one are not staged.
        acc_MN = add_tile(
            acc_MN, begin_MN, q, k, v, dout, dweights, statistics, delta, score, sizes, batch, head,
            row0, row0 + shift, WIDTH, VALUE_WIDTH, BLOCK_D, BLOCK_E, PRECISION,
        )  # fmt: skip
    place = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    tl.store(tiles + program.to(tl.int64) * (BLOCK_M * BLOCK_N) + place, acc_MN)


@triton.jit
def diagonals_kernel(
    tiles, dvector, reach, num_diagonals, num_splits, keep,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The near offsets' sums: dvector (H, 2 * reach + 1), of which the two ends are left alone."""
    first_index = tl.program_id(0) * BLOCK
    head = tl.program_id(1)
    width = 2 * reach + 1
    index = first_index + tl.arange(0, BLOCK)
    local_M = tl.arange(0, BLOCK_M)[:, None]
    total = tl.zeros([BLOCK_M, BLOCK], dtype=tl.float32)
    for diagonal in range(num_diagonals):
        # A place (i, j) of the tile has offset j - i + diagonal * N + 1 - reach.
        column = index[None, :] - 1 - diagonal * BLOCK_N + local_M
        inside = (column >= 0) & (column < BLOCK_N)
        first = first_index - 1 - diagonal * BLOCK_N
        if (first + BLOCK - 1 + BLOCK_M - 1 >= 0) & (first < BLOCK_N):
            for split in tl.range(num_splits, loop_unroll_factor=2):
                tile = (head * num_diagonals + diagonal) * num_splits + split
                base = tiles + tile.to(tl.int64) * (BLOCK_M * BLOCK_N)
                total += tl.load(base + local_M * BLOCK_N + column, mask=inside, other=0.0)
    near = (index > 0) & (index < width - 1)
    tl.store(dvector + tl.cast(head, tl.int64) * width + index, tl.sum(total, 0) / keep, mask=near)


@triton.jit
def ends_kernel(
    dvector, left, right, total, reach, batches, length,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sums of a head's far offsets, the two ends of dvector (H, 2 * reach + 1).

    LEFT, RIGHT: "sums" adds up left or right (B, H, length); "rest" is what the others leave of
    the sum of all, total (H,) or 0; "none" is 0.
    """
    head = tl.program_id(0)
    base = dvector + tl.cast(head, tl.int64) * (2 * reach + 1)
    left_end = 0.0
    right_end = 0.0
    if LEFT == "sums":
        left_end = sum_of_head(left, head, batches, length, BLOCK)
    if RIGHT == "sums":
        right_end = sum_of_head(right, head, batches, length, BLOCK)
    if LEFT == "rest" or RIGHT == "rest":
        near = tl.zeros([BLOCK], dtype=tl.float32)
        local = tl.arange(0, BLOCK)
        for first in range(1, 2 * reach, BLOCK):
            near += tl.load(base + first + local, mask=first + local < 2 * reach, other=0.0)
        rest = -tl.sum(near, 0) - left_end - right_end
        if total is not None:
            rest += tl.load(total + head)
        if LEFT == "rest":
            left_end = rest
        else:
            right_end = rest
    tl.store(base, left_end)
    tl.store(base + 2 * reach, right_end)


@triton.jit
def sum_of_head(tensor, head, batches, length, BLOCK: tl.constexpr):
    """The sum of what a tensor (B, H, length) has for one head."""
    local = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], dtype=tl.float32)
    for batch in range(batches):
        plane = (batch * tl.num_programs(0) + head).to(tl.int64)
        for first in range(0, length, BLOCK):
            place = tensor + plane * length + first + local
            sums += tl.load(place, mask=first + local < length, other=0.0)
    return tl.sum(sums, 0)


@triton.jit
def dense_kernel(
    q, k, v, dout, dweights, statistics, delta, dbias, score, sizes, bias_heads, bias_batch,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    SUM_ROWS: tl.constexpr, SUM_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradient of a dense bias: each program owns a tile of it, and visits everything that tile was
    added to.

    SUM_ROWS, SUM_COLUMNS: the bias has one row, or one column.
    """
    program = tl.program_id(0)
    num_columns = tl.cdiv(sizes.keys, BLOCK_N)
    num_rows = tl.cdiv(sizes.queries, BLOCK_M)
    first_column = 0
    last_column = num_columns
    if not SUM_COLUMNS:
        first_column = program % num_columns
        last_column = first_column + 1
        program = program // num_columns
    first_row = 0
    last_row = num_rows
    if not SUM_ROWS:
        first_row = program % num_rows
        last_row = first_row + 1
        program = program // num_rows
    own_head = program % bias_heads
    own_batch = program // bias_heads
    heads = sizes.heads // bias_heads
    batches = sizes.batch // bias_batch
    zero_MN = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    acc_MN = zero_MN
    shift = sizes.keys - sizes.queries
    for column_tile in tl.range(first_column, last_column):
        column0 = column_tile * BLOCK_N
        for row_tile in tl.range(first_row, last_row):
            row0 = row_tile * BLOCK_M
            hidden = column0 < 0
            if score.positions is None:
                if score.causal:
                    hidden = column0 > row0 + BLOCK_M - 1 + shift
                if score.window is not None:
                    hidden = hidden | (column0 + BLOCK_N - 1 <= row0 + shift - score.window)
            items = tl.where(hidden, 0, heads * batches)
            for item in tl.range(0, items):
                # One of the two counts is 1 where the bias has its own entries.
                head = own_head + item % heads
                batch = tl.cast(own_batch + item // heads, tl.int64)
                acc_MN = add_tile(
                    acc_MN, zero_MN, q, k, v, dout, dweights, statistics, delta, score, sizes,
                    batch, head, row0, column0, WIDTH, VALUE_WIDTH, BLOCK_D, BLOCK_E, PRECISION,
                )  # fmt: skip
    if score.dropout is not None:
        acc_MN = acc_MN / score.dropout.keep
    local_M = tl.arange(0, BLOCK_M)
    local_N = tl.arange(0, BLOCK_N)
    row0 = first_row * BLOCK_M
    column0 = first_column * BLOCK_N
    base = (
        dbias.pointer
        + tl.cast(own_batch, tl.int64) * dbias.batch
        + tl.cast(own_head, tl.int64) * dbias.head
    )
    dtype = dbias.pointer.dtype.element_ty
    if SUM_ROWS and SUM_COLUMNS:
        tl.store(base, tl.sum(acc_MN).to(dtype))
    elif SUM_ROWS:
        column = column0 + local_N
        tl.store(base + column, tl.sum(acc_MN, 0).to(dtype), mask=column < sizes.keys)
    elif SUM_COLUMNS:
        rows = row0 + local_M
        tl.store(base + rows * dbias.row, tl.sum(acc_MN, 1).to(dtype), mask=rows < sizes.queries)
    else:
        rows = (row0 + local_M)[:, None]
        column = (column0 + local_N)[None, :]
        place = base + rows.to(tl.int64) * dbias.row + column
        inside = (rows < sizes.queries) & (column < sizes.keys)
        tl.store(place, acc_MN.to(dtype), mask=inside)
