"""Rotations of queries and keys in one pass over each, forward and backward.

Torch makes some ten tensors of each.

Shape suffixes: B batch, H heads, L length, D head dimension, P pairs of features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from zeta.ops.backends.cpu import library
from zeta.ops.buffers import rows
from zeta.ops.turning import Turning, turned_by_torch


def can_turn() -> bool:
    """Whether the library turns tensors here."""
    return library.obstacle() is None and library.load().direct is not None


def rotated(
    query: Tensor, key: Tensor | None, tables: Sequence[Tensor], interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Queries and keys, turned.

    Args:
        query: ``(B, H, L, D)``, in any dtype up to float32.
        key: Likewise, with heads and a length of its own; or None.
        tables: Cosines and sines of the queries, and with ``key`` those of the keys, float32,
            ``(L, P)`` or ``(1 or B, 1, L, P)``. They get no gradient.
        interleaved: Pairs are features ``(2p, 2p + 1)``; otherwise ``(p, p + P)``. Those from
            ``2 P`` on stay as they are.

    Returns:
        Of the shapes and dtypes of ``query`` and ``key``; without keys, the second is empty.
    """
    if torch.is_grad_enabled() and (query.requires_grad or (key is not None and key.requires_grad)):
        found: tuple[Tensor, Tensor] = Turning.apply(  # type: ignore[no-untyped-call]
            _turn, query, key, interleaved, False, *tables
        )
        return found
    return _turn(query, key, tables, interleaved, False)


def _turn(
    query: Tensor, key: Tensor | None, tables: Sequence[Tensor], interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    """See `zeta.ops.turning.Turn`."""
    direct = library.load().direct
    assert direct is not None
    numbers = interleaved, inverse, torch.get_num_threads()
    query = rows(query)
    out = torch.empty_like(query)
    if key is None:
        out_key = query.new_empty(0)
        answer = direct.rotate(*numbers, query, out, *tables)
    else:
        key = rows(key)
        out_key = torch.empty_like(key)
        answer = direct.rotate(*numbers, query, out, *tables[:2], key, out_key, *tables[2:])
    if library.is_done(answer):
        return out, out_key
    # Of strides, dtypes or sizes that are not for it.
    return turned_by_torch(query, key, tables, interleaved, inverse)
