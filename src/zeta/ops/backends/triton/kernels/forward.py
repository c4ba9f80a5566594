"""Attention forward: one program for each tile of query rows, keys streamed, softmax kept online.

M: query rows of a tile, N: key columns of a tile, D and E: padded widths of keys and of values.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zeta.ops.backends.triton.kernels.ranges import column_parts, count_tiles, tile_start
from zeta.ops.backends.triton.kernels.scores import (
    LN2,
    column_hashes,
    exponential,
    far_bias,
    kept,
    load_keys,
    load_rows,
    logarithm,
    row_hashes,
    score_tile,
    store_rows,
    visible,
)


@triton.jit
def weigh(
    dots_MN, peak_M, score, sizes, batch, head, row0, column0, row, column, side,
    CLEAN: tl.constexpr,
):  # fmt: skip
    """Exponentials of a tile of scores, and the new and the finite peak that they stand against."""
    plain: tl.constexpr = (
        (CLEAN or score.begins or score.offsets is None)
        and score.folds and not score.exact and score.softcap is None
        and score.slopes is None and score.dense is None and score.documents is None
        and score.keep is None
    )  # fmt: skip
    if plain:
        # The scale is positive: what hides a product hides its score, and their peaks are one.
        if not CLEAN:
            seen = visible(score, sizes, batch, row0, column0, row, column)
            dots_MN = tl.where(seen, dots_MN, float("-inf"))
        new_peak_M = tl.maximum(peak_M, tl.max(dots_MN, 1) * score.scale + side)
        safe_M = tl.where(new_peak_M == float("-inf"), 0.0, new_peak_M)
        p_MN = exponential(dots_MN * score.scale - (safe_M - side)[:, None], score)
        return p_MN, new_peak_M, safe_M
    else:
        s_MN, _ = score_tile(
            dots_MN, score, sizes, batch, head, row0, column0, row, column, side, CLEAN
        )
        new_peak_M = tl.maximum(peak_M, tl.max(s_MN, 1))
        safe_M = tl.where(new_peak_M == float("-inf"), 0.0, new_peak_M)
        return exponential(s_MN - safe_M[:, None], score), new_peak_M, safe_M


@triton.jit
def add_weights(
    dots_MN, total_M, peak_M, score, sizes, batch, head, row0, column0, row, column, side,
    CLEAN: tl.constexpr,
):  # fmt: skip
    """A tile's step of the running softmax: its exponentials, by how much those before shrink, and
    the new sum and peak of each row.
    """
    p_MN, new_peak_M, safe_M = weigh(
        dots_MN, peak_M, score, sizes, batch, head, row0, column0, row, column, side, CLEAN
    )
    decay_M = exponential(peak_M - safe_M, score)
    return p_MN, decay_M, total_M * decay_M + tl.sum(p_MN, 1), new_peak_M


@triton.jit
def attend(
    acc_ME, total_M, peak_M, q_MD, k, v, score, sizes, batch, head, row0,
    low, one, two, three, four, high, left, right,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, EVEN: tl.constexpr, VALUES: tl.constexpr, CLEAN: tl.constexpr,
):  # fmt: skip
    """Adds the clean tiles of keys, or the others, to the running softmax of a tile of rows."""
    local_M = tl.arange(0, q_MD.shape[0])
    local_N = tl.arange(0, BLOCK_N)
    row = local_M[:, None]
    column = local_N[None, :]
    inner_D = tl.arange(0, q_MD.shape[1])
    outer_E = tl.arange(0, acc_ME.shape[1])
    key_head = head // sizes.group
    row_hash_M = row_hashes(score, sizes, batch, head, row0, local_M)
    for index in tl.range(0, count_tiles(low, one, two, three, four, high, BLOCK_N, CLEAN)):
        column0 = tile_start(index, low, one, two, three, four, BLOCK_N, CLEAN)
        k_ND = load_keys(
            k, score, sizes, batch, key_head, column0, local_N, inner_D, WIDTH, CLEAN or EVEN
        )
        dots_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision=PRECISION)
        p_MN, decay_M, total_M, peak_M = add_weights(
            dots_MN, total_M, peak_M, score, sizes, batch, head, row0, column0, row, column,
            tl.where(column0 < two, left, right), CLEAN,
        )  # fmt: skip
        if VALUES:
            if score.dropout is not None:
                column_hash_N = column_hashes(score, sizes, batch, column0, local_N)
                keep_MN = kept(score, row_hash_M[:, None], column_hash_N[None, :])
                p_MN = tl.where(keep_MN, p_MN, 0.0)
            v_NE = load_keys(
                v,
                score,
                sizes,
                batch,
                key_head,
                column0,
                local_N,
                outer_E,
                VALUE_WIDTH,
                CLEAN or EVEN,
            )
            acc_ME = acc_ME * decay_M[:, None]
            acc_ME = tl.dot(p_MN.to(v_NE.dtype), v_NE, acc_ME, input_precision=PRECISION)
    return acc_ME, total_M, peak_M


@triton.jit
def store_statistics(lse, statistics, total_M, peak_M, score, sizes, index, inside):
    """The natural log of the normaliser, -inf for a row without weights; and what backward passes
    read.

    Those read it in the score's unit, +inf for a row without weights. Where `exact`, as the peak
    and, a plane further, a factor: the rounding of a sum of both would show in every weight.
    """
    empty_M = total_M == 0.0
    rest_M = logarithm(tl.where(empty_M, 1.0, total_M), score)
    lse_M = peak_M + rest_M
    if score.exact:
        plane = tl.cast(sizes.batch, tl.int64) * sizes.heads * sizes.queries
        tl.store(statistics + index, tl.where(empty_M, float("inf"), peak_M), mask=inside)
        inverse_M = 1.0 / tl.where(empty_M, 1.0, total_M)
        tl.store(statistics + plane + index, inverse_M, mask=inside)
    else:
        tl.store(statistics + index, tl.where(empty_M, float("inf"), lse_M), mask=inside)
        lse_M = lse_M * LN2
    tl.store(lse + index, tl.where(empty_M, float("-inf"), lse_M), mask=inside)


@triton.jit
def forward_kernel(
    q, k, v, out, lse, statistics, score, sizes,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    EVEN: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Writes the output and the normalisers of a tile of rows; without VALUES, only the latter.

    EVEN: the keys fill whole tiles.
    """
    num_tiles = tl.cdiv(sizes.queries, BLOCK_M)
    program = tl.program_id(0)
    # Later rows see more keys under a causal mask: begin with them.
    row0 = (num_tiles - 1 - program % num_tiles) * BLOCK_M
    batch_head = program // num_tiles
    head = batch_head % sizes.heads
    batch = (batch_head // sizes.heads).to(tl.int64)
    local_M = tl.arange(0, BLOCK_M)
    q_MD = load_rows(
        q, batch, head, row0, local_M, sizes.queries, tl.arange(0, BLOCK_D), WIDTH, False
    )
    acc = tl.zeros([BLOCK_M, BLOCK_E], dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    left = far_bias(score, head, False)
    right = far_bias(score, head, True)
    low, one, two, three, four, high = column_parts(score, sizes, batch, row0, BLOCK_M, BLOCK_N)
    cut: tl.constexpr = (
        score.causal or score.window is not None or score.offsets is not None
        or score.padding is not None or score.prefix is not None or score.positions is not None
        or not EVEN
    )  # fmt: skip
    if score.positions is None:
        acc, total, peak = attend(
            acc, total, peak, q_MD, k, v, score, sizes, batch, head, row0,
            low, one, two, three, four, high, left, right,
            WIDTH, VALUE_WIDTH, BLOCK_N, PRECISION, EVEN, VALUES, True,
        )  # fmt: skip
    if cut:
        acc, total, peak = attend(
            acc, total, peak, q_MD, k, v, score, sizes, batch, head, row0,
            low, one, two, three, four, high, left, right,
            WIDTH, VALUE_WIDTH, BLOCK_N, PRECISION, EVEN, VALUES, False,
        )  # fmt: skip
    index = tl.cast(batch_head, tl.int64) * sizes.queries + row0 + local_M
    inside = row0 + local_M < sizes.queries
    store_statistics(lse, statistics, total, peak, score, sizes, index, inside)
    if VALUES:
        inverse_M = 1.0 / tl.where(total == 0.0, 1.0, total)
        if score.dropout is not None:
            inverse_M = inverse_M / score.dropout.keep
        store_rows(
            out, batch, head, row0, local_M, sizes.queries, tl.arange(0, BLOCK_E), VALUE_WIDTH,
            acc * inverse_M[:, None],
        )  # fmt: skip
