"""Padding masks of a sequence that arrives in pieces.

Shapes: B batch, N new tokens, L all tokens so far.
"""

import torch
from torch import Tensor

from zeta.values import check_tensor


def extend_padding(
    remembered: Tensor | None, new: Tensor | None, *, batch: int, length: int, added: int
) -> Tensor | None:
    """The padding of all tokens.

    Args:
        remembered: ``(B, L - N)``, of the tokens before; None: none of them is padding.
        new: ``(B, N)``, of the new tokens, or ``(B, L)``, of all; None: none of the new is padding.
        batch: B.
        length: L.
        added: N.

    Returns:
        ``(B, L)``, or None if nothing is padding. Floating point if either part is.

    Raises:
        ValueError: ``new`` has another shape.
        TypeError: ``new`` is no tensor, or neither bool nor floating point.
    """
    if new is None:
        if remembered is None:
            return None
        return torch.cat((remembered, remembered.new_zeros(batch, added)), dim=1)
    check_tensor("key_padding_mask", new)
    if new.dtype != torch.bool and not new.is_floating_point():
        raise TypeError(f"key_padding_mask must be bool or floating point; got {new.dtype}")
    if new.shape == (batch, length):
        return new
    if new.shape != (batch, added):
        either = (
            f"({batch}, {added})"
            if added == length
            else f"({batch}, {added}) or ({batch}, {length})"
        )
        raise ValueError(f"key_padding_mask must have shape {either}; got {tuple(new.shape)}")
    if remembered is None:
        remembered = new.new_zeros(batch, length - added)
    return torch.cat(alike(remembered, new), dim=1)


def kept_padding(
    remembered: Tensor | None, new: Tensor | None, *, batch: int, length: int, added: int
) -> Tensor | None:
    """`extend_padding`, to be remembered: whoever gave ``new`` may write to it afterwards."""
    padding = extend_padding(remembered, new, batch=batch, length=length, added=added)
    return padding.clone() if padding is not None and padding is new else padding


def check_padding(name: str, padding: object, batch: int, length: int) -> None:
    """Check a padding mask that something else than a cache may have written.

    Raises:
        TypeError: It is no tensor, or neither bool nor floating point.
        ValueError: It is not ``(batch, length)``.
    """
    check_tensor(name, padding)
    assert isinstance(padding, Tensor)
    if padding.dtype != torch.bool and not padding.is_floating_point():
        raise TypeError(f"{name} must be bool or floating point; got {padding.dtype}")
    if padding.shape != (batch, length):
        raise ValueError(f"{name} must have shape ({batch}, {length}); got {tuple(padding.shape)}")


def alike(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two padding masks of which either both are bool or both floating point."""
    if first.dtype == second.dtype:
        return first, second
    return _as_added(first), _as_added(second)


def _as_added(padding: Tensor) -> Tensor:
    """A padding mask in the form that is added to the scores."""
    if padding.dtype != torch.bool:
        return padding
    return torch.zeros_like(padding, dtype=torch.float32).masked_fill(padding, float("-inf"))
