"""What compiled kernels read and write, as tensors: dense rows, unwritten results.

Shape suffixes: B batch, H heads, T length.
"""

import torch
from torch import Tensor


def written_out(tensor: Tensor) -> Tensor:
    """The tensor, copied if its memory does not hold its numbers: negated ones, zeros that are none
    anywhere.
    """
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    return tensor.clone() if tensor._is_zerotensor() else tensor


def rows(tensor: Tensor) -> Tensor:
    """The tensor, written out, copied unless its last dimension is dense."""
    tensor = written_out(tensor)
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def empty_rows(like: Tensor, width: int) -> Tensor:
    """An unwritten ``(B, H, T, width)`` tensor, its heads inside or outside of the length as in
    ``like``.
    """
    batch, heads, length, features = like.shape
    if width == features and like.is_contiguous():
        return torch.empty_like(like)
    if like.stride(1) < like.stride(2):
        return like.new_empty((batch, length, heads, width)).transpose(1, 2)
    return like.new_empty((batch, heads, length, width))


def empty_contiguous(tensor: Tensor | None, other: Tensor) -> Tensor:
    """An unwritten tensor like the first; an empty one, of the other's kind, in place of None."""
    if tensor is None:
        return other.new_empty(0)
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)
