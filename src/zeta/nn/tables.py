"""Tables of rotations: cosines and sines of positions, times a decay for xPos.

On the CPU they are kept for a while: every layer of a model asks for the same, and to make them
takes longer than to use them.

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


FEW = 64
"""Positions of a decoding step, whose tables are kept: the next layer has the same."""
MAX_FEATURES = 1 << 19
"""Of all positions together, of consecutive ones that are kept: 2 MiB of tables, 4 for xPos."""

Number: TypeAlias = int | tuple[torch.Size, tuple[int, ...]] | None
"""A position, none, or a tensor of them, to be looked up by."""


def looked_up(
    x: Tensor, positions: Positions, anchor: Positions = 0, origin: Tensor | None = None
) -> tuple[int, Number, Number, Number] | None:
    """The length of ``x``, and its positions, to be looked up by; None where they are too many, or
    nothing may be kept."""
    length = x.shape[-2]
    if not can_keep(x.device) or length * x.shape[-1] > MAX_FEATURES:
        return None
    for tensor in (positions, anchor, origin):
        if isinstance(tensor, Tensor) and (
            type(tensor) is not Tensor
            or tensor.dtype != torch.int64
            or tensor.numel() > FEW
            or length > FEW
        ):
            return None
    return length, _number(positions, step=1), _number(anchor, step=0), _number(origin)


def _number(positions: Positions | None, step: int | None = None) -> Number:
    """The first alone where it is followed by others a step apart."""
    if not isinstance(positions, Tensor):
        return positions
    shape, values = positions.shape, tuple(positions.flatten().tolist())
    if step is not None and values and len(values) == shape[-1]:
        first: int = values[0]
        if all(number == first + step * place for place, number in enumerate(values)):
            return first
    return shape, values


def _restored(number: Number) -> Positions | None:
    if isinstance(number, tuple):
        shape, values = number
        return torch.tensor(values, dtype=torch.int64, device="cpu").view(shape)
    return number


def kept_rotation_tables(
    rotary_dim: int,
    base: float,
    scaling: Scaling | None,
    dtype: torch.dtype,
    length: int,
    positions: Number,
) -> Table:
    """`rotation_tables` of what is `looked_up`. Not to be written to."""
    keep = few_rotation_tables if length <= FEW else _rotation_rows
    return keep(rotary_dim, base, scaling, dtype, length, positions)


def kept_xpos_tables(
    head_dim: int,
    scale_base: float,
    dtype: torch.dtype,
    length: int,
    positions: Number,
    anchor: Number,
    origin: Number,
) -> tuple[Table, Table]:
    """`xpos_tables` of what is `looked_up`. Not to be written to."""
    keep = few_xpos_tables if length <= FEW else _xpos_rows
    return keep(head_dim, scale_base, dtype, length, positions, anchor, origin)


@functools.lru_cache(maxsize=64)
def few_rotation_tables(
    rotary_dim: int,
    base: float,
    scaling: Scaling | None,
    dtype: torch.dtype,
    length: int,
    positions: Number,
) -> Table:
    """`kept_rotation_tables` of a few positions."""
    form = rotary_dim, base, scaling, dtype
    if isinstance(positions, int):
        first = positions // FEW * FEW
        return _narrowed(_rotation_rows(*form, 2 * FEW, first), positions - first, length)
    # One of inference mode could not be used outside of it.
    with torch.inference_mode(False), torch.no_grad():
        found = _restored(positions)
        assert found is not None
        return rotation_tables(*form, position_tensor(found, length, torch.device("cpu")))


@functools.lru_cache(maxsize=64)
def few_xpos_tables(
    head_dim: int,
    scale_base: float,
    dtype: torch.dtype,
    length: int,
    positions: Number,
    anchor: Number,
    origin: Number,
) -> tuple[Table, Table]:
    """`kept_xpos_tables` of a few positions."""
    form = head_dim, scale_base, dtype
    if isinstance(positions, int) and isinstance(anchor, int) and origin is None:
        first = positions // FEW * FEW
        of_queries, of_keys = _xpos_rows(*form, 2 * FEW, first, anchor, None)
        row = positions - first
        return _narrowed(of_queries, row, length), _narrowed(of_keys, row, length)
    with torch.inference_mode(False), torch.no_grad():
        at, about, since = map(_restored, (positions, anchor, origin))
        assert at is not None
        assert about is not None
        assert not isinstance(since, int)
        return xpos_tables(*form, *position_tensors(torch.empty(length, 0), at, about), since)


# Of consecutive positions: a whole sequence's, or those of a step and of the next ones, which come
# with it, for to make those of one position takes as long.


@functools.lru_cache(maxsize=4)
def _rotation_rows(
    rotary_dim: int,
    base: float,
    scaling: Scaling | None,
    dtype: torch.dtype,
    length: int,
    first: Number,
) -> Table:
    assert isinstance(first, int)
    with torch.inference_mode(False), torch.no_grad():
        return rotation_tables(rotary_dim, base, scaling, dtype, _from(first, length))


@functools.lru_cache(maxsize=4)
def _xpos_rows(
    head_dim: int,
    scale_base: float,
    dtype: torch.dtype,
    length: int,
    first: Number,
    anchor: Number,
    origin: Number,
) -> tuple[Table, Table]:
    assert isinstance(first, int)
    assert isinstance(anchor, int)
    assert origin is None
    with torch.inference_mode(False), torch.no_grad():
        position_L = _from(first, length)
        return xpos_tables(head_dim, scale_base, dtype, position_L, anchor, None)


def _from(first: int, length: int) -> Tensor:
    return torch.arange(first, first + length, device="cpu")


def _narrowed(table: Table, row: int, length: int) -> Table:
    cos, sin = table
    return cos.narrow(0, row, length), sin.narrow(0, row, length)
