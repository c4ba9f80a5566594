"""Rotations of queries and keys by tables: one kernel for both on a GPU, torch's operations
elsewhere.

Shapes: B batch, H heads, L length, D head dimension, P pairs of features.
"""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from zeta.positions import rotate
from zeta.standin import PLAIN
from zeta.transforms import is_closed_to_operators, is_watched

Table: TypeAlias = tuple[Tensor, Tensor]
"""Cosines and sines, times the scale where there is one: ``(L, P)`` or ``(1 or B, 1, L, P)``."""


def rotate_one(x: Tensor, table: Table, *, interleaved: bool = True) -> Tensor:
    """Turn the first ``2 P`` features, in the table's precision.

    Args:
        x: ``(..., L, D)``.
        table: Of its tokens.
        interleaved: As in `zeta.positions.rotate`.

    Returns:
        As ``x``, in its dtype.
    """
    if has_kernel((x,), table):
        from zeta.ops.backends.triton import rotation

        return rotation.rotated(x, None, table, interleaved)[0]
    return _rotated(x, table, interleaved)


def rotate_both(
    query: Tensor, key: Tensor, of_query: Table, of_key: Table, *, interleaved: bool = True
) -> tuple[Tensor, Tensor]:
    """`rotate_one` of queries and of keys, by tables of as many pairs."""
    if has_kernel((query, key), (*of_query, *of_key)):
        from zeta.ops.backends.triton import rotation

        return rotation.rotated(query, key, (*of_query, *of_key), interleaved)
    return _rotated(query, of_query, interleaved), _rotated(key, of_key, interleaved)


def has_kernel(tensors: Sequence[Tensor], tables: Sequence[Tensor]) -> bool:
    """Whether the kernel can turn these, and nothing asks to see how it is done."""
    if not tensors[0].is_cuda:
        return False
    from zeta.ops.backends import triton

    if torch.compiler.is_compiling():
        if is_closed_to_operators():
            return False
    elif is_watched() or any(type(tensor) not in PLAIN for tensor in (*tensors, *tables)):
        return False
    return (
        all(x.dim() == 4 and x.dtype in triton.DTYPES for x in tensors)
        and all(t.dim() in (2, 4) and t.dtype == torch.float32 for t in tables)
        and not any(t.requires_grad for t in tables)
        and not triton.unsupported_device(tensors[0].device)
    )


def _rotated(x: Tensor, table: Table, interleaved: bool) -> Tensor:
    rotary_dim, width = 2 * table[0].shape[-1], x.shape[-1]
    if rotary_dim == width:
        return rotate(x, *table, interleaved=interleaved)
    turned, kept = x.split((rotary_dim, width - rotary_dim), dim=-1)
    return torch.cat((rotate(turned, *table, interleaved=interleaved), kept), dim=-1)
