"""Rotations by a compiled kernel, whichever it is, as autograd sees them.

The gradient of a rotation is the rotation by the negative angle, with the same scale. So what turns
also differentiates, as often as one likes.

Shape suffixes: B batch, H heads, L length, D head dimension, P pairs of features.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from zeta.positions import rotate_part
from zeta.transforms import is_watched, of_each_gradient

Kernel: TypeAlias = Callable[[Tensor, Tensor | None, Sequence[Tensor], bool], tuple[Tensor, Tensor]]
"""Queries and keys, turned, with their gradients: what each backend calls ``rotated``.

Args:
    query: ``(B, H, L, D)``, in any dtype up to float32.
    key: Likewise, with heads and a length of its own; or None.
    tables: Cosines and sines of the queries, and with ``key`` those of the keys, float32,
        ``(L, P)`` or ``(1 or B, 1, L, P)``. They get no gradient.
    interleaved: Pairs are features ``(2p, 2p + 1)``; otherwise ``(p, p + P)``. Those from ``2 P``
        on stay as they are.

Returns:
    Of the shapes and dtypes of ``query`` and ``key``; without keys, the second is empty.
"""

Turn: TypeAlias = Callable[
    [Tensor, Tensor | None, Sequence[Tensor], bool, bool], tuple[Tensor, Tensor]
]
"""The same without gradients; it takes besides whether the angles are to be negative."""


def turned(
    turn: Turn,
    query: Tensor,
    key: Tensor | None,
    tables: Sequence[Tensor],
    interleaved: bool,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """What a `Turn` makes, with gradients where they are needed."""
    if not torch.is_grad_enabled() or not (
        query.requires_grad or (key is not None and key.requires_grad)
    ):
        return turn(query, key, tables, interleaved, inverse)
    found: tuple[Tensor, Tensor] = Turning.apply(turn, query, key, interleaved, inverse, *tables)  # type: ignore[no-untyped-call]  # torch's own
    return found


def turned_by_torch(
    query: Tensor, key: Tensor | None, tables: Sequence[Tensor], interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    """A `Turn` for whatever the kernels do not take, or must not."""

    def one(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rotate_part(x, cos, -sin if inverse else sin, interleaved=interleaved)

    of_key = query.new_empty(0) if key is None else one(key, *tables[2:])
    return one(query, *tables[:2]), of_key


class Turning(torch.autograd.Function):
    """See `turned`."""

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
            made
            for x, made in zip((query, key), output, strict=True)
            if x is None or not x.requires_grad
        ]
        ctx.mark_non_differentiable(*constant)
        return output

    @staticmethod
    def backward(ctx: Any, dquery: Tensor | None, dkey: Tensor | None) -> tuple[Any, ...]:
        tables = ctx.saved_tensors
        # A transform, say, may have come after the forward pass.
        back = turned_by_torch if is_watched() else partial(turned, ctx.turn)

        def turn(first: Tensor, second: Tensor | None, tables: Sequence[Tensor]) -> Any:
            return back(first, second, tables, ctx.interleaved, not ctx.inverse)

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
