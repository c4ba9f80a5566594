"""From a module's ``attn_mask``, ``key_padding_mask`` and ``rel_pos`` to mask and bias values.

Shapes: B batch, H heads, T target length, S source length.
"""

from typing import TypeAlias

import torch
from torch import Tensor

from zeta.biases import Bias
from zeta.biases import Dense as DenseBias
from zeta.masks import Causal, Mask, Padding, SlidingWindow
from zeta.masks import Dense as DenseMask
from zeta.nn.biases import ALiBi, RelativePositionBias
from zeta.values import broadcasts, check_device

AttentionMask: TypeAlias = Tensor | Mask
RelativePosition: TypeAlias = Tensor | RelativePositionBias | ALiBi | Bias
Sizes: TypeAlias = tuple[int, int, int, int]
"""Batch, heads, target length, source length."""


def structured_mask(
    is_causal: bool, window: int | None, sizes: Sizes, *, ordered: bool
) -> Mask | None:
    """What the order of tokens hides: nothing from a single query that ends the sequence.

    Args:
        is_causal: Hide later keys.
        window: Hide later keys and those ``window`` or more positions before the query.
        sizes: Of the scores.
        ordered: Whether the keys are those of positions 0 to S - 1.
    """
    _, _, target, source = sizes
    if window is not None:
        return None if target == 1 and source <= window and ordered else SlidingWindow(window)
    return Causal() if is_causal and target > 1 else None


def join(
    attn_mask: AttentionMask | None,
    padding: Tensor | None,
    rel_pos: RelativePosition | None,
    mask: Mask | None,
    sizes: Sizes,
    device: torch.device,
) -> tuple[Mask | None, Bias | None]:
    """All masks and biases of a call as one of each.

    Args:
        attn_mask: As `MultiheadAttention.forward` takes it.
        padding: ``(B, S)``, checked; bool, True for padding, or floating point.
        rel_pos: As `MultiheadAttention.forward` takes it. Applied before what is added by masks.
        mask: Hides more.
        sizes: Of the scores.
        device: Of the query.

    Raises:
        ValueError: A shape or a device is wrong.
        TypeError: A type or a dtype is wrong.
    """
    bias = None if rel_pos is None else _rel_pos(rel_pos, sizes, device)
    if attn_mask is not None:
        mask, bias = join_one(_attn_mask(attn_mask, sizes, device), mask, bias)
    if padding is not None:
        check_device("key_padding_mask", padding, device)
        mask, bias = join_one(hide_or_add(padding[:, None, None]), mask, bias)
    return mask, bias


def join_one(
    found: Mask | Bias, mask: Mask | None, bias: Bias | None
) -> tuple[Mask | None, Bias | None]:
    """The mask and the bias of a call, the one of them with ``found``."""
    if isinstance(found, Mask):
        return found if mask is None else mask & found, bias
    return mask, found if bias is None else bias + found


def _attn_mask(attn_mask: AttentionMask, sizes: Sizes, device: torch.device) -> Mask | Bias:
    if isinstance(attn_mask, Mask):
        return attn_mask
    if not isinstance(attn_mask, Tensor):
        raise TypeError(
            f"attn_mask must be a tensor or a value from zeta.masks; got {type(attn_mask).__name__}"
        )
    batch, heads, target, source = sizes
    shape, dim = attn_mask.shape, attn_mask.dim()
    dense: Tensor | None = None
    if shape[-2:] == (target, source):
        if dim == 2:
            dense = attn_mask[None, None]
        elif dim == 3 and shape[0] == batch:
            dense = attn_mask[:, None]
        elif dim == 3 and shape[0] == batch * heads:
            dense = attn_mask.unflatten(0, (batch, heads))
    if dim == 4 and broadcasts(shape, sizes):
        dense = attn_mask
    if dense is None:
        raise ValueError(
            f"attn_mask must have shape ({target}, {source}), ({batch}, {target}, {source}), "
            f"({batch * heads}, {target}, {source}) or "
            f"(1 or {batch}, 1 or {heads}, {target}, {source}); "
            f"got {tuple(shape)}"
        )
    if dense.dtype != torch.bool and not dense.is_floating_point():
        raise TypeError(f"attn_mask must be bool or floating point; got {dense.dtype}")
    check_device("attn_mask", dense, device)
    return hide_or_add(dense)


def hide_or_add(tensor: Tensor) -> Mask | Bias:
    """A module's mask: bool hides where True, floating point is added."""
    return DenseMask(~tensor) if tensor.dtype == torch.bool else DenseBias(tensor)


def seen_mask(seen_BS: Tensor) -> Mask | None:
    """The value of a padding mask, bool, True where there is a token: lengths where all padding is
    at the end, which kernels skip; None if there is no padding.

    Waits once for the device.
    """
    lengths_B = seen_BS.sum(1)
    first = torch.arange(seen_BS.shape[1], device=seen_BS.device) < lengths_B[:, None]
    whole, at_the_end = torch.stack((seen_BS.all(), (first == seen_BS).all())).tolist()
    if whole:
        return None
    return Padding(lengths_B) if at_the_end else DenseMask(seen_BS[:, None, None, :])


def _rel_pos(rel_pos: RelativePosition, sizes: Sizes, device: torch.device) -> Bias:
    batch, heads, target, source = sizes
    if isinstance(rel_pos, RelativePositionBias | ALiBi):
        num_heads = (
            rel_pos.n_heads if isinstance(rel_pos, RelativePositionBias) else rel_pos.num_heads
        )
        if num_heads != heads:
            raise ValueError(f"rel_pos must be for {heads} heads; got one for {num_heads}")
        return rel_pos.value()
    if isinstance(rel_pos, Bias):
        return rel_pos
    if not isinstance(rel_pos, Tensor):
        raise TypeError(
            "rel_pos must be a tensor, a RelativePositionBias, an ALiBi or a zeta.biases value; "
            f"got {type(rel_pos).__name__}"
        )
    shape = rel_pos.shape
    dense: Tensor | None = None
    if shape[-2:] == (target, source):
        if rel_pos.dim() == 3 and shape[0] == heads:
            dense = rel_pos[None]
        elif rel_pos.dim() == 3 and shape[0] == batch * heads:
            dense = rel_pos.unflatten(0, (batch, heads))
        elif rel_pos.dim() == 4 and broadcasts(shape[:1], (batch,)) and shape[1] == heads:
            dense = rel_pos
    if dense is None:
        raise ValueError(
            f"rel_pos must have shape ({batch * heads}, {target}, {source}), "
            f"({heads}, {target}, {source}) or (1 or {batch}, {heads}, {target}, {source}); "
            f"got {tuple(shape)}"
        )
    if not dense.is_floating_point():
        raise TypeError(f"rel_pos must be floating point; got {dense.dtype}")
    check_device("rel_pos", dense, device)
    return DenseBias(dense)
