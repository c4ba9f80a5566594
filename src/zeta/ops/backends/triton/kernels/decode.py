"""Attention of a few queries over many keys: split over the keys, then merged.

The query heads that share a key head are rows of one tile, so that each key is read once, or of as
few as there is room for.
M: rows of a tile, N: key columns of a tile, D and E: padded widths of keys and of values.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zeta.ops.backends.triton.configs import SPLIT_ROWS
from zeta.ops.backends.triton.kernels.forward import add_weights, store_statistics
from zeta.ops.backends.triton.kernels.ranges import column_parts
from zeta.ops.backends.triton.kernels.scores import (
    column_hashes,
    exponential,
    find_pages,
    kept,
    load_keys,
    load_pages,
    row_hashes,
)

MOST_ROWS: tl.constexpr = tl.constexpr(SPLIT_ROWS)


@triton.jit
def store_results(
    out, lse, statistics, acc_ME, total_M, peak_M, score, sizes, index_M, inside_M, outer_E,
    VALUE_WIDTH: tl.constexpr,
):  # fmt: skip
    """Writes outputs and normalisers of rows, counted through all batch entries, heads, queries."""
    store_statistics(lse, statistics, total_M, peak_M, score, sizes, index_M, inside_M)
    inverse_M = 1.0 / tl.where(total_M == 0.0, 1.0, total_M)
    if score.dropout is not None:
        inverse_M = inverse_M / score.dropout.keep
    row_M = index_M % sizes.queries
    head_M = index_M // sizes.queries % sizes.heads
    batch_M = tl.cast(index_M // sizes.queries // sizes.heads, tl.int64)
    base_M = batch_M * out.batch + tl.cast(head_M, tl.int64) * out.head + row_M * out.row
    value_ME = (acc_ME * inverse_M[:, None]).to(out.pointer.dtype.element_ty)
    wanted = inside_M[:, None] & (outer_E[None, :] < VALUE_WIDTH)
    tl.store(out.pointer + base_M[:, None] + outer_E[None, :], value_ME, mask=wanted)


# Any number of splits is served by the same code: else there would be more for multiples of 16.
@triton.jit(do_not_specialize=["num_splits"])
def split_kernel(
    q, k, v, pages, parts, out, lse, statistics, score, sizes, num_splits,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes the parts that `merge_kernel` merges; of a single split, which has none, the results.

    Keys and values are rows of tensors, or lie in pages.
    """
    num_tiles = tl.cdiv(sizes.queries * sizes.group, BLOCK_M)
    program = tl.program_id(0)
    split = program % num_splits
    tile = program // num_splits % num_tiles
    batch_head = program // num_splits // num_tiles
    key_heads = sizes.heads // sizes.group
    key_head = batch_head % key_heads
    batch = (batch_head // key_heads).to(tl.int64)
    local_M = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    local_N = tl.arange(0, BLOCK_N)
    inner_D = tl.arange(0, BLOCK_D)
    outer_E = tl.arange(0, BLOCK_E)
    inside_M = local_M < sizes.queries * sizes.group
    row_M = local_M % sizes.queries
    head_M = key_head * sizes.group + tl.minimum(local_M // sizes.queries, sizes.group - 1)
    row0 = program * 0
    pointers = q.pointer + batch * q.batch + tl.cast(head_M, tl.int64)[:, None] * q.head
    pointers += row_M[:, None] * q.row + inner_D[None, :]
    wanted = inside_M[:, None] & (inner_D[None, :] < WIDTH)
    q_MD = tl.load(pointers, mask=wanted, other=0.0)
    row_hash_M = row_hashes(score, sizes, batch, head_M, row0, row_M)
    acc_ME = tl.zeros([BLOCK_M, BLOCK_E], dtype=tl.float32)
    total_M = tl.zeros([BLOCK_M], dtype=tl.float32)
    peak_M = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    # Rows of a tile are of any queries.
    ends = column_parts(score, sizes, batch, row0, MOST_ROWS, BLOCK_N)
    low = ends[0]
    high = ends[5]
    share = tl.cdiv(tl.cdiv(high - low, BLOCK_N), num_splits) * BLOCK_N
    start = low + split * share
    for column0 in tl.range(start, tl.minimum(start + share, high), BLOCK_N):
        if pages is None:
            k_ND = load_keys(
                k, score, sizes, batch, key_head, column0, local_N, inner_D, WIDTH, False
            )
        else:
            found = find_pages(pages, score, sizes, batch, column0, local_N)
            k_ND = load_pages(k, key_head, found, inner_D, WIDTH)
        dots_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision=PRECISION)
        p_MN, decay_M, total_M, peak_M = add_weights(
            dots_MN, total_M, peak_M, score, sizes, batch, head_M[:, None], row0, column0,
            row_M[:, None], local_N[None, :], 0.0, False,
        )  # fmt: skip
        if score.dropout is not None:
            column_hash_N = column_hashes(score, sizes, batch, column0, local_N)
            keep_MN = kept(score, row_hash_M[:, None], column_hash_N[None, :])
            p_MN = tl.where(keep_MN, p_MN, 0.0)
        if pages is None:
            v_NE = load_keys(
                v, score, sizes, batch, key_head, column0, local_N, outer_E, VALUE_WIDTH, False
            )
        else:
            v_NE = load_pages(v, key_head, found, outer_E, VALUE_WIDTH)
        acc_ME = acc_ME * decay_M[:, None]
        acc_ME = tl.dot(p_MN.to(v_NE.dtype), v_NE, acc_ME, input_precision=PRECISION)
    index_M = (batch * sizes.heads + head_M) * sizes.queries + row_M
    if parts is None:
        store_results(
            out, lse, statistics, acc_ME, total_M, peak_M, score, sizes, index_M, inside_M, outer_E,
            VALUE_WIDTH,
        )  # fmt: skip
    else:
        place_M = tl.cast(split, tl.int64) * sizes.batch * sizes.heads * sizes.queries + index_M
        tl.store(parts.totals + place_M, total_M, mask=inside_M)
        tl.store(parts.peaks + place_M, peak_M, mask=inside_M)
        tl.store(
            parts.sums + place_M[:, None] * VALUE_WIDTH + outer_E[None, :],
            acc_ME,
            mask=inside_M[:, None] & (outer_E[None, :] < VALUE_WIDTH),
        )


@triton.jit(do_not_specialize=["num_splits"])
def merge_kernel(
    parts, out, lse, statistics, score, sizes, num_splits,
    VALUE_WIDTH: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Merges the splits of some rows, counted through all batch entries, heads and queries."""
    index_M = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    count = sizes.batch * sizes.heads * sizes.queries
    inside_M = index_M < count
    outer_E = tl.arange(0, BLOCK_E)
    wanted = inside_M[:, None] & (outer_E[None, :] < VALUE_WIDTH)
    acc_ME = tl.zeros([BLOCK_M, BLOCK_E], dtype=tl.float32)
    total_M = tl.zeros([BLOCK_M], dtype=tl.float32)
    peak_M = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    for split in tl.range(0, num_splits):
        place_M = tl.cast(split, tl.int64) * count + index_M
        part_M = tl.load(parts.peaks + place_M, mask=inside_M, other=float("-inf"))
        new_peak_M = tl.maximum(peak_M, part_M)
        safe_M = tl.where(new_peak_M == float("-inf"), 0.0, new_peak_M)
        decay_M = exponential(peak_M - safe_M, score)
        growth_M = exponential(part_M - safe_M, score)
        part_total_M = tl.load(parts.totals + place_M, mask=inside_M, other=0.0)
        total_M = total_M * decay_M + part_total_M * growth_M
        part_ME = tl.load(
            parts.sums + place_M[:, None] * VALUE_WIDTH + outer_E[None, :], mask=wanted, other=0.0
        )
        acc_ME = acc_ME * decay_M[:, None] + part_ME * growth_M[:, None]
        peak_M = new_peak_M
    store_results(
        out, lse, statistics, acc_ME, total_M, peak_M, score, sizes, index_M, inside_M, outer_E,
        VALUE_WIDTH,
    )  # fmt: skip
