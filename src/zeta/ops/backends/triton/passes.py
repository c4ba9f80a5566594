"""Forward passes: outputs are allocated, kernels launched.

Shape suffixes: B batch, H query heads, T target length, S source length.
"""

from typing import Any

import torch
from torch import Tensor

from zeta.ops.backends.triton import hopper
from zeta.ops.backends.triton.arguments import (
    Fixed,
    cdiv,
    given_rows,
    is_exact,
    launch,
    power_of_two,
    rows_operand,
    score_operand,
    shape_of_tiles,
    sizes_of,
    spread,
    statistics_shape,
)
from zeta.ops.backends.triton.configs import SPLIT_ROWS
from zeta.ops.backends.triton.kernels.decode import merge_kernel, split_kernel
from zeta.ops.backends.triton.kernels.forward import forward_kernel
from zeta.ops.backends.triton.kernels.operands import PageTable, Parts, Rows, Score, Sizes
from zeta.ops.backends.triton.kernels.weights import weights_kernel
from zeta.ops.buffers import empty_rows, rows

SPLIT_KEYS = 128
"""From so many keys on they are split, for up to `SPLIT_ROWS` rows that share a key head."""
SPLIT_PROGRAMS, MAX_SPLITS = 528, 64
"""About how many programs share the keys: four for each multiprocessor of a large device."""
LEAST_ROWS = 16
"""Of a tile of queries, padded if need be."""
MERGE_ROWS = 4


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    offsets: Tensor | None,
    dense: Tensor | None,
    fixed: Fixed,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, lse ``(B, H, T)``, statistics; without values, the output is empty."""
    query, key = rows(query), rows(key)
    wanted = value is not None
    value = key if value is None else rows(value)
    sizes = sizes_of(query, key)
    out = empty_rows(query, value.shape[-1] if wanted else 0)
    lse = query.new_empty((sizes.batch, sizes.heads, sizes.queries), dtype=torch.float32)
    statistics = lse.new_empty(statistics_shape(query))
    score = score_operand(query, key, offsets, dense, fixed)
    results = (rows_operand(out), lse, statistics)
    few = wanted and _is_few(query, value.shape[-1], score, sizes, fixed)
    if wanted and not few and hopper.takes(score, query, key, value):
        # Gluon is imported only where it serves.
        from zeta.ops.backends.triton.hopper import passes as on_hopper

        on_hopper.forward(query, key, value, results, score, sizes)
        return out, lse, statistics
    inputs = (given_rows(query), given_rows(key), given_rows(value))
    if few:
        _split(query, value.shape[-1], (*inputs, None), results, score, sizes, fixed)
        return out, lse, statistics
    constants = shape_of_tiles(
        "forward", query, fixed.causal, query.shape[-1], value.shape[-1],
        has_dense=dense is not None,
    )  # fmt: skip
    grid = (cdiv(sizes.queries, constants["BLOCK_M"]) * sizes.batch * sizes.heads,)
    score = spread(score, sizes, constants["BLOCK_M"], constants["BLOCK_N"])
    launch(
        forward_kernel, grid, *inputs, *results, score, sizes,
        EVEN=sizes.keys % constants["BLOCK_N"] == 0, VALUES=wanted, **constants,
    )  # fmt: skip
    return out, lse, statistics


def over_pages(
    query: Tensor,
    key: Tensor,
    pages: tuple[Tensor, Tensor],
    table: PageTable,
    offsets: Tensor | None,
    dense: Tensor | None,
    fixed: Fixed,
) -> tuple[Tensor, Tensor]:
    """The output and lse ``(B, H, T)`` of a few queries over keys and values in pages.

    Args:
        query: As in `forward`.
        key: Stands for the keys; its shape is all that is read.
        pages: ``(P, G, page size, D)`` of keys and of values.
        table: Which of them are whose.
        offsets, dense, fixed: As in `forward`.
    """
    query = rows(query)
    sizes, width = sizes_of(query, key), pages[1].shape[-1]
    out = empty_rows(query, width)
    lse = query.new_empty((sizes.batch, sizes.heads, sizes.queries), dtype=torch.float32)
    results = (rows_operand(out), lse, lse.new_empty(statistics_shape(query)))
    score = score_operand(query, key, offsets, dense, fixed)
    inputs = (given_rows(query), rows_operand(pages[0]), rows_operand(pages[1]), table)
    _split(query, width, inputs, results, score, sizes, fixed)
    return out, lse


def _is_few(query: Tensor, width: int, score: Score, sizes: Sizes, fixed: Fixed) -> bool:
    """Whether `_split` serves: it is of use because a tile is small, heads share keys, or several
    programs share them.
    """
    packed = sizes.queries * sizes.group
    if packed > SPLIT_ROWS or sizes.keys < SPLIT_KEYS:
        return False
    if packed <= LEAST_ROWS or sizes.group > 1:
        return True
    constants = _split_tiles(query, width, score, sizes, fixed)
    return _num_splits(sizes, constants["BLOCK_N"]) > 1


def _split_tiles(
    query: Tensor, width: int, score: Score, sizes: Sizes, fixed: Fixed
) -> dict[str, Any]:
    """Compile-time arguments of `split_kernel`."""
    constants = shape_of_tiles("split", query, fixed.causal, query.shape[-1], width)
    packed = sizes.queries * sizes.group
    constants["BLOCK_M"] = min(constants["BLOCK_M"], max(LEAST_ROWS, power_of_two(packed)))
    # More registers: a product of float32 is made of three, and a bias is gathered.
    is_large = is_exact(query) or score.offsets is not None or score.dense is not None
    if constants["BLOCK_M"] > (LEAST_ROWS if is_large else 64):
        constants["BLOCK_N"] = min(constants["BLOCK_N"], 64)
        constants["num_warps"] *= 2
    return constants


def _num_splits(sizes: Sizes, columns: int) -> int:
    """How many programs share the keys of a key head."""
    programs = sizes.batch * sizes.heads // sizes.group
    return min(cdiv(SPLIT_PROGRAMS, programs), cdiv(sizes.keys, 2 * columns), MAX_SPLITS)


def _split(
    query: Tensor,
    width: int,
    inputs: tuple[Rows, Rows, Rows, PageTable | None],
    results: tuple[Rows, Tensor, Tensor],
    score: Score,
    sizes: Sizes,
    fixed: Fixed,
) -> None:
    """The forward pass of a few queries over many keys."""
    constants = _split_tiles(query, width, score, sizes, fixed)
    if inputs[3] is not None:
        # The pipeline shares its stages between a lookup and what is looked up.
        constants["num_stages"] = 2 * constants["num_stages"] - 1
    num_splits = _num_splits(sizes, constants["BLOCK_N"])
    programs = cdiv(sizes.queries * sizes.group, constants["BLOCK_M"]) * num_splits
    programs *= sizes.batch * sizes.heads // sizes.group
    num_rows = sizes.batch * sizes.heads * sizes.queries
    parts = None
    if num_splits > 1:
        sums = results[1].new_empty((num_splits, num_rows, width))
        parts = Parts(sums, *(sums.new_empty((num_splits, num_rows)) for _ in range(2)))
    launch(
        split_kernel, (programs,), *inputs, parts, *results, score, sizes, num_splits,
        **constants,
    )  # fmt: skip
    if parts is not None:
        launch(
            merge_kernel, (cdiv(num_rows, MERGE_ROWS),), parts, *results, score, sizes, num_splits,
            VALUE_WIDTH=width, BLOCK_E=power_of_two(width), BLOCK_M=MERGE_ROWS, num_warps=2,
        )  # fmt: skip


def weights(
    query: Tensor,
    key: Tensor,
    offsets: Tensor | None,
    dense: Tensor | None,
    mean: bool,
    fixed: Fixed,
) -> tuple[Tensor, Tensor]:
    """Weights ``(B, H, T, S)`` or their mean ``(B, T, S)``, and statistics."""
    query, key = rows(query), rows(key)
    _, _, statistics = forward(query, key, None, offsets, dense, fixed)
    sizes = sizes_of(query, key)
    planes = (sizes.batch,) if mean else (sizes.batch, sizes.heads)
    out = query.new_empty((*planes, sizes.queries, sizes.keys))
    constants = shape_of_tiles("weights", query, fixed.causal, query.shape[-1])
    num_tiles = cdiv(sizes.queries, constants["BLOCK_M"])
    num_tiles *= cdiv(sizes.keys, constants["BLOCK_N"])
    score = score_operand(query, key, offsets, dense, fixed)
    launch(
        weights_kernel, (num_tiles * sizes.batch * (1 if mean else sizes.heads),),
        given_rows(query), given_rows(key), statistics, out,
        spread(score, sizes, constants["BLOCK_M"], constants["BLOCK_N"]), sizes, MEAN=mean,
        **constants,
    )  # fmt: skip
    return out, statistics
