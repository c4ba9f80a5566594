"""Tables of rotations: cosines and sines of positions, times a decay for xPos.

Those of a decoding step are kept for a while: every layer of a model asks for the same, and to make
them takes longer than to use them.

Shapes: B batch, H heads, L length, D head dimension, P pairs of features.
"""

import functools
import math
from typing import TypeAlias

import torch
from torch import Tensor

from zeta.nn.scalings import Scaling
from zeta.ops.rotation import Table
from zeta.positions import angle_tables, can_keep, rotary_tables, xpos_rates
from zeta.values import wide_dtype

Positions: TypeAlias = int | Tensor
"""Position of the first of consecutive tokens, or of each: ``(L,)`` or ``(1 or B, L)``."""


def last_positions(positions: Positions, earlier: int) -> Positions:
    """Those of the tokens after the first ``earlier``."""
    if not earlier:
        return positions
    return positions[..., earlier:] if isinstance(positions, Tensor) else positions + earlier


def rotation_tables(
    rotary_dim: int, base: float, scaling: Scaling | None, dtype: torch.dtype, position_L: Tensor
) -> Table:
    """Of `RotaryEmbedding`."""
    if scaling is None:
        return rotary_tables(position_L, rotary_dim, base=base, dtype=dtype)
    frequency_P = scaling.frequencies(rotary_dim, base=base, device=position_L.device)
    cos, sin = angle_tables(position_L, frequency_P, dtype=dtype)
    return cos * scaling.magnitude, sin * scaling.magnitude


def xpos_tables(
    head_dim: int,
    scale_base: float,
    dtype: torch.dtype,
    position_L: Tensor,
    anchor: Positions,
    origin: Tensor | None,
) -> tuple[Table, Table]:
    """Of `XPos`: of queries, and of keys."""
    cos, sin, power = decaying_tables(head_dim, scale_base, dtype, position_L, anchor, origin)
    scale, inverse = power.exp2().to(cos.dtype), power.neg_().exp2_().to(cos.dtype)
    return (cos * scale, sin * scale), (cos * inverse, sin * inverse)


def decaying_tables(
    head_dim: int,
    scale_base: float,
    dtype: torch.dtype,
    position_L: Tensor,
    anchor: Positions,
    origin: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines, sines, and the binary logarithm of the scale of queries, in float64."""
    wide = wide_dtype(dtype)
    # float32 angles: those that models with xPos were trained with.
    cos, sin = rotary_tables(position_L, head_dim, dtype=wide, angle_dtype=torch.float32)
    counted = position_L if origin is None else position_L - origin[:, None, None]
    rates_P = xpos_rates(head_dim, scale_base=scale_base, device=position_L.device)
    power = counted[..., None] * rates_P
    if isinstance(anchor, Tensor) or anchor:
        power = power - exponents(anchor, rates_P)
    # What stands nowhere, as padding does, must not overflow; nobody reads it.
    limit = math.log2(torch.finfo(dtype).max / 2.0)
    return cos, sin, power.clamp_(-limit, limit)


def exponents(anchor: Positions, rates_P: Tensor) -> Tensor:
    """The binary logarithm of an anchor's scale, rounded: ``(..., P)`` of anchors ``(...)``."""
    return ((anchor[..., None] if isinstance(anchor, Tensor) else anchor) * rates_P).round_()


def position_tensors(
    x: Tensor, positions: Positions, anchor: Positions
) -> tuple[Tensor, Positions]:
    """Positions, and anchors if each token has its own, as `position_tensor`."""
    length, device = x.shape[-2], x.device
    if isinstance(anchor, Tensor):
        anchor = position_tensor(anchor, length, device)
    return position_tensor(positions, length, device), anchor


def position_tensor(positions: Positions, length: int, device: torch.device) -> Tensor:
    """Positions that broadcast over ``(B, H, L, D)`` without its last dimension."""
    if isinstance(positions, Tensor):
        return positions if positions.dim() == 1 else positions.unsqueeze(1)
    return torch.arange(positions, positions + length, device=device)


MAX_KEPT = 64
"""Positions of a decoding step whose tables are kept: the next layer has the same."""

Number: TypeAlias = int | tuple[torch.Size, tuple[int, ...]] | None
"""A position, none, or a tensor of them, to be looked up by."""


def few_positions(x: Tensor, *positions: Positions | None) -> tuple[int | Number, ...] | None:
    """The length of ``x``, and the positions of its few tokens, to be looked up by; None where they
    are many, or nothing may be kept."""
    if not can_keep(x.device) or x.shape[-2] > MAX_KEPT:
        return None
    found: list[int | Number] = [x.shape[-2]]
    for number in positions:
        if not isinstance(number, Tensor):
            found.append(number)
        elif type(number) is Tensor and number.dtype == torch.int64 and number.numel() <= MAX_KEPT:
            found.append((number.shape, tuple(number.flatten().tolist())))
        else:
            return None
    return tuple(found)


def _restored(number: Number) -> Positions | None:
    if isinstance(number, tuple):
        shape, values = number
        return torch.tensor(values, dtype=torch.int64).view(shape)
    return number


@functools.lru_cache(maxsize=64)
def kept_rotation_tables(
    rotary_dim: int,
    base: float,
    scaling: Scaling | None,
    dtype: torch.dtype,
    length: int,
    positions: Number,
) -> Table:
    """`rotation_tables` of `few_positions`. Not to be written to."""
    # One of inference mode could not be used outside of it.
    with torch.inference_mode(False), torch.no_grad():
        found = _restored(positions)
        assert found is not None
        position_L = position_tensor(found, length, torch.device("cpu"))
        return rotation_tables(rotary_dim, base, scaling, dtype, position_L)


@functools.lru_cache(maxsize=64)
def kept_xpos_tables(
    head_dim: int,
    scale_base: float,
    dtype: torch.dtype,
    length: int,
    positions: Number,
    anchor: Number,
    origin: Number,
) -> tuple[Table, Table]:
    """`xpos_tables` of `few_positions`. Not to be written to."""
    with torch.inference_mode(False), torch.no_grad():
        at, about, since = map(_restored, (positions, anchor, origin))
        assert at is not None
        assert about is not None
        assert not isinstance(since, int)
        like = torch.empty(length, 0)
        tensors = position_tensors(like, at, about)
        return xpos_tables(head_dim, scale_base, dtype, *tensors, since)
