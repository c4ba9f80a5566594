"""Rotations of queries and keys in one pass over each, forward and backward.

Torch makes some ten tensors of each.

Shape suffixes: B batch, H heads, L length, D head dimension, P pairs of features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from zeta.ops.backends.cpu import library
from zeta.ops.buffers import rows
from zeta.ops.turning import turned, turned_by_torch


def can_turn() -> bool:
    """Whether the library turns tensors here."""
    return library.obstacle() is None and library.load().direct is not None


def rotated(
    query: Tensor, key: Tensor | None, tables: Sequence[Tensor], interleaved: bool
) -> tuple[Tensor, Tensor]:
    """See `zeta.ops.turning.Kernel`."""
    return turned(_turn, query, key, tables, interleaved)


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
