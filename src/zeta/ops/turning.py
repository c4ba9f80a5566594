"""Rotations by a compiled kernel, whichever it is, as autograd sees them.

The gradient of a rotation is the rotation by the negative angle, with the same scale. So what turns
also differentiates, as often as one likes.

Shape suffixes: B batch, H heads, L length, D head dimension, P pairs of features.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from zeta.positions import rotate_part
from zeta.transforms import is_watched, of_each_gradient

Turn: TypeAlias = Callable[
    [Tensor, Tensor | None, Sequence[Tensor], bool, bool], tuple[Tensor, Tensor]
]
"""Queries ``(B, H, L, D)`` and keys, or None, turned by tables of both.

Takes whether features ``(2p, 2p + 1)`` are a pair, or ``(p, p + P)``, and whether the angles are
to be negative. Without keys the second result is empty.
"""


def turned_by_torch(
    query: Tensor, key: Tensor | None, tables: Sequence[Tensor], interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    """A `Turn` for whatever the kernels do not take, or must not."""

    def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rotate_part(x, cos, -sin if inverse else sin, interleaved=interleaved)

    of_key = query.new_empty(0) if key is None else turned(key, *tables[2:])
    return turned(query, *tables[:2]), of_key


class Turning(torch.autograd.Function):
    """What a `Turn` makes."""

    @staticmethod
    def forward(
        ctx: Any,
        turn: Turn,
        query: Tensor,
        key: Tensor | None,
        interleaved: bool,
        inverse: bool,
        *tables: Tensor,
    ) -> tuple[Tensor, Tensor]:
        output = turn(query, key, tables, interleaved, inverse)
        ctx.turn, ctx.interleaved, ctx.inverse = turn, interleaved, inverse
        ctx.save_for_backward(*tables)
        ctx.set_materialize_grads(False)
        constant = [
            turned
            for x, turned in zip((query, key), output, strict=True)
            if x is None or not x.requires_grad
        ]
        ctx.mark_non_differentiable(*constant)
        return output

    @staticmethod
    def backward(ctx: Any, dquery: Tensor | None, dkey: Tensor | None) -> tuple[Any, ...]:
        tables = ctx.saved_tensors
        is_seen = is_watched()

        def turn(first: Tensor, second: Tensor | None, tables: Sequence[Tensor]) -> Any:
            if is_seen:
                # By a transform, say, that came after the forward pass.
                return turned_by_torch(first, second, tables, ctx.interleaved, not ctx.inverse)
            return Turning.apply(  # type: ignore[no-untyped-call]
                ctx.turn, first, second, ctx.interleaved, not ctx.inverse, *tables
            )

        found = gradients(turn, tables, dquery, dkey)
        return None, *found, None, None, *[None] * len(tables)


def gradients(
    turn: Callable[[Tensor, Tensor | None, Sequence[Tensor]], tuple[Tensor, Tensor]],
    tables: Sequence[Tensor],
    dquery: Tensor | None,
    dkey: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of queries and of keys, turned back by ``turn(tensor, other or None, tables)``.

    Args:
        turn: Of which they are.
        tables: Of the queries, and of the keys if there are any.
        dquery, dkey: What arrives; None for none.
    """

    def back(dquery: Tensor | None, dkey: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if len(tables) == 2:
            dkey = None
        if dquery is None:
            return None, None if dkey is None else turn(dkey, None, tables[2:])[0]
        if dkey is None:
            return turn(dquery, None, tables[:2])[0], None
        return turn(dquery, dkey, tables)

    return of_each_gradient(back, dquery, dkey)
