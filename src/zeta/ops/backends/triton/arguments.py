"""What the kernels are launched with, made from tensors.

Shape suffixes: B batch, H query heads, G key heads, T target length, S source length, D head
dimension.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from zeta.ops.backends.triton import configs
from zeta.ops.backends.triton.kernels.dropout import hash_kernel
from zeta.ops.backends.triton.kernels.operands import (
    Dropout,
    Labels,
    Offsets,
    Places,
    Plane,
    Rows,
    Score,
    Sizes,
    Softcap,
    Spread,
)
from zeta.ops.backends.triton.kernels.spreading import spread_kernel
from zeta.ops.buffers import written_out
from zeta.ops.dropout import threshold
from zeta.ops.lowering import LAST_POSITION

LOG2E = 1.4426950408889634
SPREAD_SCORES = 1 << 20
"""From so many scores of a head on, an offset bias is written out for the tiles that its band cuts:
read as a vector, in a tile where few elements are next to each other, it takes longer.
"""
HASH_BLOCK = 1024
FARTHEST_ROW = 1 << 24
"""Elements from a row to the next at most: inside of a tile kernels count them in 32 bits."""
FLAGS = tl.constexpr(False), tl.constexpr(True)
"""Constants of kernels; a new one takes longer than to look at one."""
MIN_SCALE = 2.0**-60
"""Products begin with an offset bias over the scale, which is not to overflow."""


@dataclasses.dataclass(slots=True)
class Fixed:
    """What needs no gradient, as the operators get it."""

    tensors: Sequence[Tensor | None]
    scale: float
    causal: bool
    window: int
    softcap: float
    softcap_first: bool
    dropout_p: float
    hashes: tuple[Tensor, Tensor] | None = None
    """Both halves of the dropout's hash, where they are made already."""

    def __post_init__(self) -> None:
        # Triton takes Python's numbers, and none of numpy's.
        self.window, self.softcap = int(self.window), float(self.softcap)
        self.dropout_p = float(self.dropout_p)


def cdiv(number: int, divisor: int) -> int:
    # Triton's own, which can be compiled too, takes several microseconds.
    return -(-number // divisor)


def power_of_two(number: int) -> int:
    """The least that is not below a positive number."""
    return 1 << (number - 1).bit_length()


def rows_operand(tensor: Tensor) -> Rows:
    return Rows(tensor, tensor.stride(0), tensor.stride(1), tensor.stride(2))


def given_rows(tensor: Tensor) -> Rows:
    """Of what is read only: a copy where a kernel could not count from row to row."""
    return rows_operand(tensor.contiguous() if tensor.stride(2) > FARTHEST_ROW else tensor)


def plane_operand(tensor: Tensor) -> Plane:
    tensor = written_out(tensor)
    strides = (
        0 if size == 1 else stride
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return Plane(tensor, *strides)


def sizes_of(query: Tensor, key: Tensor) -> Sizes:
    batch, heads, queries, _ = query.shape
    return Sizes(batch, heads, heads // key.shape[1], queries, key.shape[2])


def is_exact(query: Tensor) -> bool:
    """Whether float32 is kept through and through: rounding to half precision would hide less."""
    return query.element_size() == 4


def score_unit(query: Tensor) -> float:
    return 1.0 if is_exact(query) else LOG2E


def statistics_shape(query: Tensor) -> tuple[int, ...]:
    """Of what the backward passes read of the normalisers: a plane of one number a row, or two."""
    return (2 if is_exact(query) else 1, *query.shape[:3])


def score_operand(
    query: Tensor, key: Tensor, offsets: Tensor | None, dense: Tensor | None, fixed: Fixed
) -> Score:
    """Everything between the products and the softmax."""
    slopes, prefix, padding, document_rows, document_columns, keep, *placed = fixed.tensors
    query_positions, key_positions, _ = placed
    unit = score_unit(query)
    return Score(
        exact=FLAGS[is_exact(query)],
        unit=unit,
        scale=fixed.scale * unit,
        slope=fixed.scale,
        folds=FLAGS[fixed.scale > 0],
        causal=FLAGS[fixed.causal],
        # Longer ones hide nothing, for keys that are seen have no negative position.
        window=fixed.window if 0 < fixed.window <= LAST_POSITION else None,
        prefix=prefix,
        padding=padding,
        documents=_labels(document_rows, document_columns),
        keep=None if keep is None else plane_operand(keep),
        positions=_labels(query_positions, key_positions),
        softcap=_softcap(fixed, unit),
        offsets=_offsets(offsets),
        spread=None,
        slopes=slopes if slopes is None or unit == 1.0 else slopes * unit,
        dense=None if dense is None else plane_operand(dense),
        dropout=_dropout(query, key, fixed),
        begins=FLAGS[False],
    )


def _labels(row: Tensor | None, column: Tensor | None) -> Labels | None:
    if row is None or column is None:
        return None
    strides = [0 if tensor.shape[0] == 1 else tensor.shape[1] for tensor in (row, column)]
    return Labels(row, strides[0], column, strides[1])


def _softcap(fixed: Fixed, unit: float) -> Softcap | None:
    if not fixed.softcap:
        return None
    return Softcap(1.0 / (fixed.softcap * unit), fixed.softcap * unit, FLAGS[fixed.softcap_first])


def _offsets(offsets: Tensor | None) -> Offsets | None:
    if offsets is None:
        return None
    return Offsets(written_out(offsets).contiguous(), offsets.shape[1] // 2)


def can_begin(score: Score) -> bool:
    """Whether products can begin with the offset bias, if there is one."""
    capped_before = score.softcap is not None and score.softcap.first.value
    return score.offsets is None or (abs(score.slope) >= MIN_SCALE and not capped_before)


def begun(score: Score) -> Score:
    """The same for kernels whose products begin with an offset bias."""
    return score._replace(begins=FLAGS[True])


def spread(
    score: Score, sizes: Sizes, rows: int, columns: int, *, key_major: bool = False
) -> Score:
    """The same with an offset bias written out for tiles of that shape, where that pays."""
    if score.offsets is None or score.positions is not None:
        return score
    if sizes.queries * sizes.keys < SPREAD_SCORES:
        return score
    # Tiles begin at multiples of the smaller length, but for where the first query is aligned.
    step, reach = min(rows, columns), score.offsets.reach
    shift = (sizes.queries - sizes.keys) % step
    first = (-reach - columns + 1 - shift) // step * step + shift
    count = -(-(reach + rows - 1 - first) // step) + 1
    return spread_from(score, sizes, (rows, columns), first, step, count, key_major=key_major)


def spread_from(
    score: Score,
    sizes: Sizes,
    tile: tuple[int, int],
    first: int,
    step: int,
    count: int,
    *,
    key_major: bool = False,
) -> Score:
    """`spread` for tiles that begin with the given offsets."""
    offsets = score.offsets
    tiles = offsets.pointer.new_empty((sizes.heads, count, *tile))
    unit = 1.0 / score.slope if score.begins.value else score.unit
    launch(
        spread_kernel, (sizes.heads * count,), *offsets, unit, tiles, count, first, step,
        BLOCK_M=tile[0], BLOCK_N=tile[1], KEY_MAJOR=key_major,
    )  # fmt: skip
    return score._replace(spread=Spread(tiles, count, first, step))


def _dropout(query: Tensor, key: Tensor, fixed: Fixed) -> Dropout | None:
    hashes = fixed.hashes or hashes_of(query, key, fixed)
    if hashes is None:
        return None
    rows, columns = hashes
    return Dropout(
        rows,
        columns,
        columns.shape[1] if columns.shape[0] > 1 else 0,
        threshold(fixed.dropout_p),
        1.0 - fixed.dropout_p,
    )


def hashes_of(query: Tensor, key: Tensor, fixed: Fixed) -> tuple[Tensor, Tensor] | None:
    """Both halves of the dropout's hash, ``(B, H, T)`` and ``(B or 1, S)``; None without any."""
    if not fixed.dropout_p:
        return None
    *_, query_positions, key_positions, seed = fixed.tensors
    assert seed is not None
    sizes = sizes_of(query, key)
    batches = 1 if key_positions is None else key_positions.shape[0]
    rows = seed.new_empty((sizes.batch, sizes.heads, sizes.queries), dtype=torch.int32)
    columns = seed.new_empty((batches, sizes.keys), dtype=torch.int32)
    longest = cdiv(max(sizes.queries, sizes.keys), HASH_BLOCK)
    launch(
        hash_kernel, (sizes.batch * sizes.heads + batches, longest), seed, rows, columns,
        Places(_labels(query_positions, key_positions)), sizes, BLOCK=HASH_BLOCK,
    )  # fmt: skip
    return rows, columns


def device_capability(tensor: Tensor) -> tuple[int, int] | None:
    """None in the interpreter."""
    return configs.capability_of(tensor.device) if tensor.is_cuda else None


def shape_of_tiles(
    kind: configs.Pass, query: Tensor, causal: bool, *widths: int, has_dense: bool = False
) -> dict[str, Any]:
    """Compile-time arguments of a kernel for these widths: padded widths, tile, precision."""
    capability = device_capability(query)
    padded = [max(16, power_of_two(width)) for width in widths]
    tiles = configs.tiles(
        kind, max(padded), query.element_size(), causal, capability, has_dense=has_dense
    )
    arguments = {
        "WIDTH": widths[0],
        "BLOCK_D": padded[0],
        "BLOCK_M": tiles.rows,
        "BLOCK_N": tiles.columns,
        "PRECISION": "ieee" if query.element_size() == 2 else "tf32x3",
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }
    if len(widths) > 1:
        arguments |= {"VALUE_WIDTH": widths[1], "BLOCK_E": padded[1]}
    return arguments


def launch(kernel: Any, grid: tuple[int, ...], *operands: Any, **constants: Any) -> None:
    """Launches a kernel on the device of its first tensor."""
    device = next(_tensors(operands)).device
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        kernel[grid](*operands, **constants)
        return
    with torch.cuda.device(device):
        kernel[grid](*operands, **constants)


def _tensors(operands: Any) -> Any:
    for operand in operands:
        if isinstance(operand, Tensor):
            yield operand
        elif isinstance(operand, tuple):
            yield from _tensors(operand)
