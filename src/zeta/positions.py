"""Maths of positions, pure functions: rotary tables, xPos scale, T5 buckets, ALiBi slopes.

Shape suffixes: B batch, H heads, T target length, S source length, D head dimension, P pairs (D /
2).
"""

import functools
import math

import torch
from torch import Tensor

from zeta.transforms import is_overridden

_ROUNDED_FROM = 8192


def rotary_frequencies(
    head_dim: int,
    *,
    base: float = 10000.0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> Tensor:
    """Angles of rotary position embeddings at position 1, ``base ** (-2p / head_dim)`` of pair p.

    Args:
        head_dim: Even number of features that are rotated.
        base: Wavelengths go from ``2 * pi`` positions to nearly ``2 * pi * base``.
        dtype: In which they are computed.
        device: Of the result.

    Returns:
        ``(head_dim / 2,)``.

    Raises:
        ValueError: If ``head_dim`` is odd or not positive.
    """
    if head_dim <= 0 or head_dim % 2:
        raise ValueError(
            f"head_dim must be even and positive to be rotated in pairs; got {head_dim}"
        )
    exponent_P = torch.arange(0, head_dim, 2, dtype=dtype, device=device)
    return 1.0 / base ** (exponent_P / head_dim)


def rotary_tables(
    positions: Tensor,
    head_dim: int,
    *,
    base: float = 10000.0,
    dtype: torch.dtype = torch.float32,
    angle_dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary position embeddings (Su et al., RoFormer, 2021, section 3.2.2).

    The angle of pair ``p`` at position ``n`` is ``n * base ** (-2p / head_dim)``.

    Args:
        positions: Any shape ``(...)``, integers or floats.
        head_dim: Even number of features that are rotated.
        base: Wavelengths go from ``2 * pi`` positions to nearly ``2 * pi * base``.
        dtype: Of the tables; float32, or float64 for a float64 model.
        angle_dtype: Of the angles: see `angle_tables`. float32 gives those of models that were
            trained so.

    Returns:
        ``(cos, sin)``, each ``(..., head_dim / 2)``.

    Raises:
        ValueError: If ``head_dim`` is odd or not positive.
    """
    if can_keep(positions.device):
        frequency_P = _kept_frequencies(head_dim, base, angle_dtype)
    else:
        frequency_P = rotary_frequencies(
            head_dim, base=base, dtype=angle_dtype, device=positions.device
        )
    return angle_tables(positions, frequency_P, dtype=dtype)


def can_keep(device: torch.device) -> bool:
    """Whether what a decoding step would make anew, for longer than it uses it, can be kept: on the
    CPU, and where nothing records or replaces tensors.
    """
    return device.type == "cpu" and not torch.compiler.is_compiling() and not is_overridden()


@functools.lru_cache(maxsize=64)
def _kept_frequencies(head_dim: int, base: float, dtype: torch.dtype) -> Tensor:
    # One of inference mode could not be used outside of it.
    with torch.inference_mode(False):
        return rotary_frequencies(head_dim, base=base, dtype=dtype, device="cpu")


@functools.lru_cache(maxsize=64)
def _kept_rates(head_dim: int, scale_base: float) -> Tensor:
    with torch.inference_mode(False):
        return _xpos_factors(head_dim, "cpu").log2_().div_(scale_base)


def angle_tables(
    positions: Tensor, frequency_P: Tensor, *, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of angles that grow with the position.

    Angles are taken in the dtype of ``frequency_P``, so that in float64 far positions keep their
    fraction of a turn, and only cosines and sines are rounded to ``dtype``. Narrower angles than
    float64 are rounded as if they counted from the last multiple of 8192: a distance means the same
    at any position.

    Args:
        positions: Any shape ``(...)``, integers or floats.
        frequency_P: Angles at position 1.
        dtype: Of the tables.

    Returns:
        ``(cos, sin)``, each ``(..., P)``.
    """
    if frequency_P.dtype == torch.float64:
        angle = positions.to(torch.float64).unsqueeze(-1) * frequency_P
    else:
        if not positions.is_floating_point():
            positions = positions.to(torch.int64)  # A narrow one does not hold what follows.
        rest = positions.fmod(_ROUNDED_FROM)
        angle = (rest.to(frequency_P.dtype).unsqueeze(-1) * frequency_P).to(torch.float64)
        whole = (positions - rest).to(torch.float64)
        angle = angle + whole.unsqueeze(-1) * frequency_P.to(torch.float64)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def xpos_scale(
    positions: Tensor,
    head_dim: int,
    *,
    scale_base: float = 512.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The decay of xPos (Sun et al., A Length-Extrapolatable Transformer, 2022, section 3).

    Queries are multiplied by ``zeta_p ** (n / scale_base)`` and keys divided by it, with
    ``zeta_p = (2p / head_dim + 0.4) / 1.4``; only the difference of two positions reaches a score.

    Args:
        positions: Any shape ``(...)``; positions from a fixed anchor, not from the middle of a
            sequence.
        head_dim: Even number of features.
        scale_base: Positions over which a feature decays by its ``zeta_p``.
        dtype: Of the table.

    Returns:
        ``(..., head_dim / 2)``.
    """
    power = positions.to(torch.float64).unsqueeze(-1) / scale_base
    return (_xpos_factors(head_dim, positions.device) ** power).to(dtype)


def xpos_rates(
    head_dim: int, *, scale_base: float = 512.0, device: torch.device | str | None = None
) -> Tensor:
    """Of `xpos_scale`, the binary logarithm at position 1: ``(head_dim / 2,)`` float64.

    Not to be written to: it may be kept for later calls.
    """
    if device is not None and can_keep(torch.device(device)):
        return _kept_rates(head_dim, scale_base)
    return _xpos_factors(head_dim, device).log2_().div_(scale_base)


def _xpos_factors(head_dim: int, device: torch.device | str | None) -> Tensor:
    # In float32, as the models with xPos were trained.
    feature_P = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device)
    return ((feature_P + 0.4 * head_dim) / (1.4 * head_dim)).to(torch.float64)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = True) -> Tensor:
    """Turn pairs of features by the given angles, in the tables' precision.

    Args:
        x: ``(..., head_dim)``.
        cos: Broadcastable to ``(..., head_dim / 2)``.
        sin: As ``cos``.
        interleaved: Pairs are features ``(2p, 2p + 1)``; otherwise ``(p, p + head_dim / 2)``.

    Returns:
        As ``x``, in its dtype.
    """
    wide = x.to(cos.dtype)
    if interleaved:
        even, odd = wide.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    else:
        first, second = wide.chunk(2, dim=-1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)


def rotate_part(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = True) -> Tensor:
    """`rotate` of the first features, as many as the tables have; the others stay as they are."""
    rotary_dim, width = 2 * cos.shape[-1], x.shape[-1]
    if rotary_dim == width:
        return rotate(x, cos, sin, interleaved=interleaved)
    turned, kept = x.split((rotary_dim, width - rotary_dim), dim=-1)
    return torch.cat((rotate(turned, cos, sin, interleaved=interleaved), kept), dim=-1)


def t5_buckets(
    offset: Tensor, *, bidirectional: bool = True, num_buckets: int = 32, max_distance: int = 128
) -> Tensor:
    """Bucket of a relative position (Raffel et al., T5, 2020, section 2.1).

    Half of the buckets hold one near distance each, the other half grow logarithmically up to
    ``max_distance``; all further distances share the last one.

    Args:
        offset: Integers of any shape, key position minus query position.
        bidirectional: Half of the buckets for keys after the query; otherwise those all fall in
            bucket 0.
        num_buckets: Number of buckets, both directions together.
        max_distance: First distance that surely falls in the last bucket.

    Returns:
        int64, the shape of ``offset``, in ``[0, num_buckets)``.

    Raises:
        ValueError: As `check_buckets`.
    """
    check_buckets(num_buckets, max_distance, bidirectional=bidirectional)
    first = torch.zeros_like(offset, dtype=torch.int64)
    if bidirectional:
        num_buckets //= 2
        first = (offset > 0).to(torch.int64) * num_buckets
        distance = offset.abs()
    else:
        distance = (-offset).clamp(min=0)
    num_exact = num_buckets // 2
    ratio = distance.clamp(min=1).to(torch.float32) / num_exact
    # In T5's order of operations: another one rounds some borders to the other side.
    growth = ratio.log() / math.log(max_distance / num_exact) * (num_buckets - num_exact)
    far = num_exact + growth.to(torch.int64)
    return first + torch.where(distance < num_exact, distance, far.clamp(max=num_buckets - 1))


def check_buckets(num_buckets: int, max_distance: int, *, bidirectional: bool) -> None:
    """Raise ValueError unless there are exact buckets, and ``max_distance`` lies beyond them."""
    num_exact = num_buckets // (4 if bidirectional else 2)
    if num_exact < 1 or max_distance <= num_exact:
        raise ValueError(
            f"max_distance must exceed the {num_exact} exact buckets of a direction, "
            f"at least 1; got max_distance={max_distance}, {num_buckets} buckets"
        )


def alibi_slopes(num_heads: int, *, device: torch.device | str | None = None) -> Tensor:
    """Slopes of ALiBi (Press et al., 2022, section 3), ``(num_heads,)`` float32 on ``device``.

    For a power of two they are ``2 ** (-8 h / num_heads)``, ``h = 1 .. num_heads``; for another
    number those of the next smaller power, followed by every other slope of the next larger one.
    """
    if num_heads < 1:
        raise ValueError(f"num_heads must be positive; got {num_heads}")
    power = 2 ** int(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * head / power) for head in range(1, power + 1)]
    slopes += [2.0 ** (-4.0 * head / power) for head in range(1, 2 * power, 2)]
    return torch.tensor(slopes[:num_heads], dtype=torch.float32, device=device)
