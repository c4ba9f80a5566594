"""Rotations of queries and keys by tables: one kernel for both where there is one, elsewhere
torch's operations.

Shapes: B batch, H heads, L length, D head dimension, P pairs of features.
"""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from zeta.ops.turning import Kernel
from zeta.positions import rotate_part
from zeta.standin import PLAIN
from zeta.transforms import is_closed_to_operators, is_overridden, is_watched

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
    kernel = kernel_for((x,), table)
    if kernel is not None:
        return kernel(x, None, table, interleaved)[0]
    return rotate_part(x, *table, interleaved=interleaved)


def rotate_both(
    query: Tensor, key: Tensor, of_query: Table, of_key: Table, *, interleaved: bool = True
) -> tuple[Tensor, Tensor]:
    """`rotate_one` of queries and of keys, by tables of as many pairs."""
    tables = *of_query, *of_key
    kernel = kernel_for((query, key), tables)
    if kernel is not None:
        return kernel(query, key, tables, interleaved)
    return (
        rotate_part(query, *of_query, interleaved=interleaved),
        rotate_part(key, *of_key, interleaved=interleaved),
    )


def kernel_for(tensors: Sequence[Tensor], tables: Sequence[Tensor]) -> Kernel | None:
    """What can turn these, if nothing asks to see how it is done.

    What ``torch.compile`` makes of torch's operations for the CPU is one pass too.
    """
    is_compiled, is_cuda = torch.compiler.is_compiling(), tensors[0].is_cuda
    if is_compiled:
        if is_closed_to_operators() or not is_cuda:
            return None
    # A default device, which is a mode of torch's functions, is nothing special on a GPU.
    elif is_watched() if is_cuda else is_overridden():
        return None
    for x in tensors:
        if x.dim() != 4 or x.dtype not in _DTYPES or not (is_compiled or type(x) in PLAIN):
            return None
    for table in tables:
        if table.dtype != torch.float32 or table.dim() not in (2, 4) or table.requires_grad:
            return None
        if not (is_compiled or type(table) in PLAIN):
            return None
    return _of_device(tensors[0].device)


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _of_device(device: torch.device) -> Kernel | None:
    if device.type == "cpu":
        from zeta.ops.backends.cpu import rotation as on_cpu

        return on_cpu.rotated if on_cpu.can_turn() else None
    if device.type != "cuda":
        return None
    from zeta.ops.backends import triton

    if triton.unsupported_device(device):
        return None
    from zeta.ops.backends.triton import rotation as on_gpu

    return on_gpu.rotated
