"""Attention backward: keys' and values' gradient, and the queries', each in its own kernel.

Each program owns what it writes, so nothing is summed by atomics: two runs give the same bits.
M: query rows of a tile, N: key columns of a tile, D and E: padded widths of keys and of values.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zeta.ops.backends.triton.kernels.gradients import (
    dscores_tile,
    load_delta,
    load_dweights,
    load_statistics,
    weights_tile,
)
from zeta.ops.backends.triton.kernels.ranges import (
    column_parts,
    count_tiles,
    row_parts,
    tile_start,
)
from zeta.ops.backends.triton.kernels.scores import (
    column_hashes,
    far_bias,
    kept,
    key_exists,
    load_keys,
    load_rows,
    row_hashes,
    store_rows,
)


@triton.jit
def gather_keys(
    dk_ND, dv_NE, k_ND, v_NE, q, dout, dweights, statistics, delta, score, sizes, batch, head,
    column0, low, one, two, three, four, high,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, CLEAN: tl.constexpr,
):  # fmt: skip
    """Adds what the clean tiles of one query head's rows, or the others, give to a tile of keys.

    Tiles are [N, M].
    """
    local_N = tl.arange(0, k_ND.shape[0])
    local_M = tl.arange(0, BLOCK_M)
    column = local_N[:, None]
    row = local_M[None, :]
    inner_D = tl.arange(0, k_ND.shape[1])
    outer_E = tl.arange(0, dv_NE.shape[1])
    column_hash_N = column_hashes(score, sizes, batch, column0, local_N)
    left = far_bias(score, head, False)
    right = far_bias(score, head, True)
    for index in tl.range(0, count_tiles(low, one, two, three, four, high, BLOCK_M, CLEAN)):
        row0 = tile_start(index, low, one, two, three, four, BLOCK_M, CLEAN)
        q_MD = load_rows(q, batch, head, row0, local_M, sizes.queries, inner_D, WIDTH, EVEN)
        norm_M, rest_M = load_statistics(statistics, score, sizes, batch, head, row0, local_M)
        delta_M = load_delta(delta, sizes, batch, head, row0, local_M)
        if score.exact:
            # In the forward pass's order, to round as it did: large scores differ in few digits.
            dots_NM = tl.trans(tl.dot(q_MD, tl.trans(k_ND), input_precision=PRECISION))
        else:
            dots_NM = tl.dot(k_ND, tl.trans(q_MD), input_precision=PRECISION)
        p_NM, slope_NM = weights_tile(
            dots_NM, norm_M[None, :], rest_M[None, :], score, sizes, batch, head, row0, column0,
            row, column, tl.where(row0 < two, right, left), CLEAN,
        )  # fmt: skip
        if dweights is None:
            dout_ME = load_rows(
                dout, batch, head, row0, local_M, sizes.queries, outer_E, VALUE_WIDTH, EVEN
            )
            dp_NM = tl.dot(v_NE, tl.trans(dout_ME), input_precision=PRECISION)
            given_NM = p_NM
            if score.dropout is not None:
                row_hash_M = row_hashes(score, sizes, batch, head, row0, local_M)
                keep_NM = kept(score, row_hash_M[None, :], column_hash_N[:, None])
                dp_NM = tl.where(keep_NM, dp_NM, 0.0)
                given_NM = tl.where(keep_NM, p_NM, 0.0)
            dv_NE = tl.dot(given_NM.to(dout_ME.dtype), dout_ME, dv_NE, input_precision=PRECISION)
        else:
            dp_NM = load_dweights(dweights, sizes, batch, head, row0, column0, row, column)
        ds_NM = p_NM * (dp_NM - delta_M[None, :])
        if score.softcap is not None:
            ds_NM = ds_NM * slope_NM
        dk_ND = tl.dot(ds_NM.to(q_MD.dtype), q_MD, dk_ND, input_precision=PRECISION)
    return dk_ND, dv_NE


@triton.jit
def keys_kernel(
    q, k, v, dout, dweights, statistics, delta, dk, dv, score, sizes,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values, over every row of every query head that shares them.

    EVEN: the queries fill whole tiles.
    """
    num_tiles = tl.cdiv(sizes.keys, BLOCK_N)
    program = tl.program_id(0)
    # Earlier keys are seen by more rows under a causal mask, and come first as they are.
    column0 = (program % num_tiles) * BLOCK_N
    key_heads = sizes.heads // sizes.group
    batch_head = program // num_tiles
    key_head = batch_head % key_heads
    batch = (batch_head // key_heads).to(tl.int64)
    local_N = tl.arange(0, BLOCK_N)
    inner_D = tl.arange(0, BLOCK_D)
    outer_E = tl.arange(0, BLOCK_E)
    k_ND = load_keys(k, score, sizes, batch, key_head, column0, local_N, inner_D, WIDTH, False)
    v_NE = k_ND
    if dweights is None:
        v_NE = load_keys(
            v, score, sizes, batch, key_head, column0, local_N, outer_E, VALUE_WIDTH, False
        )
    dk_ND = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv_NE = tl.zeros([BLOCK_N, BLOCK_E], dtype=tl.float32)
    low, one, two, three, four, high = row_parts(score, sizes, batch, column0, BLOCK_M, BLOCK_N)
    cut: tl.constexpr = (
        score.causal or score.window is not None or score.offsets is not None
        or score.prefix is not None or score.positions is not None
    )  # fmt: skip
    for member in tl.range(0, sizes.group):
        head = key_head * sizes.group + member
        if score.positions is None:
            dk_ND, dv_NE = gather_keys(
                dk_ND, dv_NE, k_ND, v_NE, q, dout, dweights, statistics, delta, score, sizes,
                batch, head, column0, low, one, two, three, four, high,
                WIDTH, VALUE_WIDTH, BLOCK_M, EVEN, PRECISION, True,
            )  # fmt: skip
        if cut:
            dk_ND, dv_NE = gather_keys(
                dk_ND, dv_NE, k_ND, v_NE, q, dout, dweights, statistics, delta, score, sizes,
                batch, head, column0, low, one, two, three, four, high,
                WIDTH, VALUE_WIDTH, BLOCK_M, EVEN, PRECISION, False,
            )  # fmt: skip
    exists_N = key_exists(score, sizes, batch, column0, local_N)[:, None]
    inverse = 1.0
    if score.dropout is not None:
        inverse = 1.0 / score.dropout.keep
    dk_ND = tl.where(exists_N, dk_ND * (score.slope * inverse), 0.0)
    store_rows(dk, batch, key_head, column0, local_N, sizes.keys, inner_D, WIDTH, dk_ND)
    if dweights is None:
        dv_NE = tl.where(exists_N, dv_NE * inverse, 0.0)
        store_rows(dv, batch, key_head, column0, local_N, sizes.keys, outer_E, VALUE_WIDTH, dv_NE)


@triton.jit
def far_sums(total_M, added_MN, first, row, column, REACH_SIGN: tl.constexpr, reach):
    """Adds the row sums of what lies beyond the reach: left of it for the sign -1, right for 1.

    `first` is the offset of the tile's first element, signed so that beyond is above.
    """
    if first - added_MN.shape[0] - added_MN.shape[1] + 2 >= reach:
        total_M += tl.sum(added_MN, 1)
    elif first + added_MN.shape[0] + added_MN.shape[1] - 2 >= reach:
        # Not by the difference of both: the compiler would keep that of every element.
        if REACH_SIGN == 1:
            beyond = column + (first - reach) >= row
        else:
            beyond = row >= column + (reach - first)
        total_M += tl.sum(tl.where(beyond, added_MN, 0.0), 1)
    return total_M


@triton.jit
def gather_queries(
    dq_MD, left_M, right_M, q_MD, dout_ME, k, v, dweights, norm_M, rest_M, delta_M, score, sizes,
    batch, head, row0, low, one, two, three, four, high,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_E: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    EVEN: tl.constexpr, CLEAN: tl.constexpr,
):  # fmt: skip
    """Adds what the clean tiles of keys, or the others, give to a tile of rows.

    LEFT and RIGHT say which far sums are wanted.
    """
    local_M = tl.arange(0, q_MD.shape[0])
    local_N = tl.arange(0, BLOCK_N)
    row = local_M[:, None]
    column = local_N[None, :]
    inner_D = tl.arange(0, q_MD.shape[1])
    key_head = head // sizes.group
    row_hash_M = row_hashes(score, sizes, batch, head, row0, local_M)
    left = far_bias(score, head, False)
    right = far_bias(score, head, True)
    zero_MN = tl.zeros([q_MD.shape[0], BLOCK_N], dtype=tl.float32)
    for index in tl.range(0, count_tiles(low, one, two, three, four, high, BLOCK_N, CLEAN)):
        column0 = tile_start(index, low, one, two, three, four, BLOCK_N, CLEAN)
        k_ND = load_keys(
            k, score, sizes, batch, key_head, column0, local_N, inner_D, WIDTH, CLEAN or EVEN
        )
        v_NE = k_ND
        if dweights is None:
            v_NE = load_keys(
                v, score, sizes, batch, key_head, column0, local_N, tl.arange(0, BLOCK_E),
                VALUE_WIDTH, CLEAN or EVEN,
            )  # fmt: skip
        added_MN, ds_MN = dscores_tile(
            zero_MN, q_MD, dout_ME, k_ND, v_NE, dweights, norm_M, rest_M, delta_M, row_hash_M,
            score, sizes, batch, head, row0, column0, row, column,
            tl.where(column0 < two, left, right), CLEAN, PRECISION,
        )  # fmt: skip
        if LEFT or RIGHT:
            first = column0 - row0 - (sizes.keys - sizes.queries)
            if LEFT:
                left_M = far_sums(left_M, added_MN, -first, row, column, -1, score.offsets.reach)
            if RIGHT:
                right_M = far_sums(right_M, added_MN, first, row, column, 1, score.offsets.reach)
        dq_MD = tl.dot(ds_MN.to(k_ND.dtype), k_ND, dq_MD, input_precision=PRECISION)
    return dq_MD, left_M, right_M


@triton.jit
def queries_kernel(
    q, k, v, dout, dweights, statistics, delta, dq, left_sums, right_sums, score, sizes,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of queries; and, where wanted, each row's sum of dS beyond the reach.

    EVEN: the keys fill whole tiles.
    """
    num_tiles = tl.cdiv(sizes.queries, BLOCK_M)
    program = tl.program_id(0)
    row0 = (num_tiles - 1 - program % num_tiles) * BLOCK_M
    batch_head = program // num_tiles
    head = batch_head % sizes.heads
    batch = (batch_head // sizes.heads).to(tl.int64)
    local_M = tl.arange(0, BLOCK_M)
    inner_D = tl.arange(0, BLOCK_D)
    LEFT: tl.constexpr = left_sums is not None
    RIGHT: tl.constexpr = right_sums is not None
    q_MD = load_rows(q, batch, head, row0, local_M, sizes.queries, inner_D, WIDTH, False)
    dout_ME = q_MD
    if dweights is None:
        dout_ME = load_rows(
            dout, batch, head, row0, local_M, sizes.queries, tl.arange(0, BLOCK_E), VALUE_WIDTH,
            False,
        )  # fmt: skip
    norm_M, rest_M = load_statistics(statistics, score, sizes, batch, head, row0, local_M)
    delta_M = load_delta(delta, sizes, batch, head, row0, local_M)
    dq_MD = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    left_M = tl.zeros([BLOCK_M], dtype=tl.float32)
    right_M = tl.zeros([BLOCK_M], dtype=tl.float32)
    low, one, two, three, four, high = column_parts(score, sizes, batch, row0, BLOCK_M, BLOCK_N)
    cut: tl.constexpr = (
        score.causal or score.window is not None or score.offsets is not None
        or score.padding is not None or score.prefix is not None or score.positions is not None
        or not EVEN
    )  # fmt: skip
    if score.positions is None:
        dq_MD, left_M, right_M = gather_queries(
            dq_MD, left_M, right_M, q_MD, dout_ME, k, v, dweights, norm_M, rest_M, delta_M, score,
            sizes, batch, head, row0, low, one, two, three, four, high,
            WIDTH, VALUE_WIDTH, BLOCK_E, LEFT, RIGHT, BLOCK_N, PRECISION, EVEN, True,
        )  # fmt: skip
    if cut:
        dq_MD, left_M, right_M = gather_queries(
            dq_MD, left_M, right_M, q_MD, dout_ME, k, v, dweights, norm_M, rest_M, delta_M, score,
            sizes, batch, head, row0, low, one, two, three, four, high,
            WIDTH, VALUE_WIDTH, BLOCK_E, LEFT, RIGHT, BLOCK_N, PRECISION, EVEN, False,
        )  # fmt: skip
    inverse = 1.0
    if score.dropout is not None:
        inverse = 1.0 / score.dropout.keep
    index = batch_head.to(tl.int64) * sizes.queries + row0 + local_M
    if LEFT:
        tl.store(left_sums + index, left_M * inverse, mask=row0 + local_M < sizes.queries)
    if RIGHT:
        tl.store(right_sums + index, right_M * inverse, mask=row0 + local_M < sizes.queries)
    dq_MD = dq_MD * (score.slope * inverse)
    store_rows(dq, batch, head, row0, local_M, sizes.queries, inner_D, WIDTH, dq_MD)
