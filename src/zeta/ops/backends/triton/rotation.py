"""Rotations of queries and keys in one launch, forward and backward.

Shape suffixes: B batch, H heads, L length, D head dimension, P pairs of features.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from zeta.ops.backends.triton.arguments import cdiv, launch, power_of_two, rows_operand
from zeta.ops.backends.triton.kernels.operands import Turned
from zeta.ops.backends.triton.kernels.rotation import rotation_kernel
from zeta.ops.backends.triton.operators import is_eager
from zeta.ops.buffers import empty_rows, rows
from zeta.ops.registration import operator
from zeta.ops.turning import gradients, turned

TILE = 2048
"""Features of a tile."""
HEADS = 4
"""Of many tokens, so many heads share what is read of a table."""


def rotated(
    query: Tensor, key: Tensor | None, tables: Sequence[Tensor], interleaved: bool
) -> tuple[Tensor, Tensor]:
    """See `zeta.ops.turning.Kernel`."""
    if not is_eager(query):
        found: tuple[Tensor, Tensor] = rotation(query, key, tables, interleaved, False)
        return found
    return turned(rotation_of, query, key, tables, interleaved)


@operator("triton_rotation")
def rotation(
    query: Tensor, key: Tensor | None, tables: Sequence[Tensor], interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    """`rotated`; with ``inverse``, by the negative angles."""
    return rotation_of(query, key, tables, interleaved, inverse)


@rotation.register_fake
def _(query: Tensor, key: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty_like(query), query.new_empty(0) if key is None else _empty_like(key)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, tables, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(*tables)
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, dquery: Tensor | None, dkey: Tensor | None) -> tuple[Any, ...]:
    def turn(first: Tensor, second: Tensor | None, tables: Sequence[Tensor]) -> Any:
        return rotation(first, second, tables, ctx.interleaved, not ctx.inverse)

    return *gradients(turn, ctx.saved_tensors, dquery, dkey), None, None, None


rotation.register_autograd(_gradient, setup_context=_save)


def rotation_of(
    query: Tensor, key: Tensor | None, tables: Sequence[Tensor], interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    """`rotation`, launched."""
    pairs = tables[0].shape[-1]
    block_p = power_of_two(pairs)
    rest = query.shape[-1] - 2 * pairs
    longest = query.shape[2] if key is None else max(query.shape[2], key.shape[2])
    # Two forms are compiled, not one for each small length.
    block_l = max(1, TILE // (2 * block_p)) if longest > 1 else 1
    heads = HEADS if longest > 1 else 1

    def programs(x: Tensor) -> int:
        return int(cdiv(x.shape[1], heads) * cdiv(x.shape[2], block_l) * x.shape[0])

    turned, of_query = _operand(query, tables[:2])
    turned_key, of_key, num_programs = query.new_empty(0), None, programs(query)
    total = num_programs
    if key is not None:
        turned_key, of_key = _operand(key, tables[2:])
        total += programs(key)
    launch(
        rotation_kernel, (total,), of_query, of_key, num_programs, INTERLEAVED=interleaved,
        INVERSE=inverse, PAIRS=pairs, REST=rest, BLOCK_L=block_l, BLOCK_P=block_p,
        BLOCK_R=power_of_two(max(rest, 1)), HEADS=heads,
    )  # fmt: skip
    return turned, turned_key


def _operand(x: Tensor, tables: Sequence[Tensor]) -> tuple[Tensor, Turned]:
    """Where the result goes, and what the kernel is given."""
    cos, sin = (table.contiguous() for table in tables)
    batch = cos.stride(0) if cos.dim() == 4 and cos.shape[0] > 1 else 0
    row = cos.shape[-1] if cos.shape[-2] > 1 else 0
    x = rows(x)
    out = _empty_like(x)
    operand = Turned(
        rows_operand(x), rows_operand(out), cos, sin, batch, row, x.shape[1], x.shape[2]
    )
    return out, operand


def _empty_like(x: Tensor) -> Tensor:
    return empty_rows(rows(x), x.shape[-1])
