"""Tables of rotations: cosines and sines of positions, times a decay for xPos.

On the CPU they are kept for a while: every layer of a model asks for the same, and to make them
takes longer than to use them.

Shapes: B batch, H heads, L length, D head dimension, P pairs of features.
"""

import functools
import math
from typing import NamedTuple, TypeAlias

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
"""Tokens of a decoding step, at most, and positions of a block."""
MAX_FEATURES = 1 << 19
"""Of all tokens together, whose tables are kept: at most 1 MiB a table of float32."""

Number: TypeAlias = int | tuple[torch.Size, tuple[int, ...]] | None
"""A number, none, or a tensor of them, to be looked up by."""


class Place(NamedTuple):
    """Where tokens stand, to be looked up by.

    Attributes:
        length: How many they are.
        positions: The first alone, where the others follow it.
        anchor: One for all, or of each.
        origin: As in `XPos.queries`.
    """

    length: int
    positions: Number
    anchor: Number
    origin: Number

    @property
    def first(self) -> int | None:
        """The first position, if all follow it and nothing tells their scales apart."""
        is_one = isinstance(self.anchor, int) and self.origin is None
        return self.positions if is_one and isinstance(self.positions, int) else None

    def tensors(self) -> tuple[Tensor, Positions, Tensor | None]:
        """As `xpos_tables` takes them."""
        positions, anchor, origin = map(_restored, self[1:])
        assert positions is not None
        assert anchor is not None
        assert not isinstance(origin, int)
        return *position_tensors(
            torch.empty(self.length, 0, device="cpu"), positions, anchor
        ), origin


def looked_up(
    x: Tensor, positions: Positions, anchor: Positions = 0, origin: Tensor | None = None
) -> Place | None:
    """The place of ``x``; None where the tokens are too many, or nothing may be kept."""
    length = x.shape[-2]
    if not can_keep(x.device) or length * x.shape[-1] > MAX_FEATURES:
        return None
    for tensor in (positions, anchor, origin):
        if isinstance(tensor, Tensor) and (
            length > FEW
            or type(tensor) is not Tensor
            or tensor.dtype != torch.int64
            or tensor.numel() > FEW
        ):
            return None
    return Place(length, _number(positions, step=1), _number(anchor, step=0), _number(origin))


def _number(positions: Positions | None, step: int | None = None) -> Number:
    """The first alone where it is followed by others a step apart."""
    if not isinstance(positions, Tensor):
        return None if positions is None else int(positions)
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
    rotary_dim: int, base: float, scaling: Scaling | None, dtype: torch.dtype, place: Place
) -> Table:
    """`rotation_tables` of what is `looked_up`. Not to be written to."""
    form = rotary_dim, base, scaling, dtype
    if place.length > FEW and place.first is not None:
        return _long_rotation_tables(*form, place.first, place.length)
    return few_rotation_tables(*form, place)


@functools.lru_cache(maxsize=64)
def few_rotation_tables(
    rotary_dim: int, base: float, scaling: Scaling | None, dtype: torch.dtype, place: Place
) -> Table:
    """`kept_rotation_tables` of a few tokens."""
    form, block = (rotary_dim, base, scaling, dtype), _block(place.first, rotary_dim)
    # Tensors of inference mode could not be used outside of it.
    with torch.inference_mode(False), torch.no_grad():
        if block is None:
            return rotation_tables(*form, place.tensors()[0])
        start, row = block
        return _rows(_rotation_block(*form, start), row, place.length)


@functools.lru_cache(maxsize=64)
def _rotation_block(
    rotary_dim: int, base: float, scaling: Scaling | None, dtype: torch.dtype, start: int
) -> Table:
    return rotation_tables(rotary_dim, base, scaling, dtype, _from(start, 2 * FEW))


@functools.lru_cache(maxsize=4)
def _long_rotation_tables(
    rotary_dim: int,
    base: float,
    scaling: Scaling | None,
    dtype: torch.dtype,
    first: int,
    length: int,
) -> Table:
    with torch.inference_mode(False), torch.no_grad():
        return rotation_tables(rotary_dim, base, scaling, dtype, _from(first, length))


def kept_xpos_tables(
    head_dim: int, scale_base: float, dtype: torch.dtype, place: Place
) -> tuple[Table, Table]:
    """`xpos_tables` of what is `looked_up`. Not to be written to."""
    form = head_dim, scale_base, dtype
    if place.length > FEW and place.first is not None:
        return _long_xpos_tables(*form, place)
    return few_xpos_tables(*form, place)


@functools.lru_cache(maxsize=64)
def few_xpos_tables(
    head_dim: int, scale_base: float, dtype: torch.dtype, place: Place
) -> tuple[Table, Table]:
    """`kept_xpos_tables` of a few tokens."""
    form, block = (head_dim, scale_base, dtype), _block(place.first, head_dim)
    with torch.inference_mode(False), torch.no_grad():
        if block is None:
            return xpos_tables(*form, *place.tensors())
        start, row = block
        assert isinstance(place.anchor, int)
        of_queries, of_keys = _xpos_block(*form, start, place.anchor)
        return _rows(of_queries, row, place.length), _rows(of_keys, row, place.length)


@functools.lru_cache(maxsize=64)
def _xpos_block(
    head_dim: int, scale_base: float, dtype: torch.dtype, start: int, anchor: int
) -> tuple[Table, Table]:
    return xpos_tables(head_dim, scale_base, dtype, _from(start, 2 * FEW), anchor, None)


@functools.lru_cache(maxsize=4)
def _long_xpos_tables(
    head_dim: int, scale_base: float, dtype: torch.dtype, place: Place
) -> tuple[Table, Table]:
    with torch.inference_mode(False), torch.no_grad():
        return xpos_tables(head_dim, scale_base, dtype, *place.tensors())


def _block(first: int | None, dim: int) -> tuple[int, int] | None:
    """Where the block begins that holds a position, and its row there; None where there is none.

    The tables of the next steps come with those of the first: to make two blocks takes hardly
    longer than to make a row.
    """
    # Further positions are no int64. Of larger blocks, 128 of which may be there, too much would be
    # held: one of 256 features in float32 has 128 KiB, or 256 for xPos.
    if first is None or dim > 256 or abs(first) > 1 << 62:
        return None
    return first // FEW * FEW, first % FEW


def _rows(table: Table, row: int, length: int) -> Table:
    """Which keep their block: no more than one for each that is looked up."""
    cos, sin = table
    return cos.narrow(0, row, length), sin.narrow(0, row, length)


def _from(first: int, length: int) -> Tensor:
    return torch.arange(first, first + length, device="cpu")
