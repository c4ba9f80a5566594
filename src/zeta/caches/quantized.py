"""`QuantizedCache`: keys and values in 8 or 4 bits.

Shapes: B batch, G key heads, N tokens, D head dimension.
"""

from functools import partial

import torch
from torch import Tensor

from zeta.caches import checks
from zeta.caches.form import Form
from zeta.caches.growing import GrowingCache
from zeta.stored import Codes, StoredTensor, can_defer
from zeta.values import check_integer, wide_dtype


class QuantizedCache(GrowingCache):
    """Every token in 0.56 (bfloat16, 8 bits) to 0.16 (float32, 4) of the memory; bounded errors.

    The features of one token in one head are rounded to multiples of a step, the ``2 ** bits - 1``
    th part of the way from their least to their greatest. So each feature is off by at most
    ``(greatest - least) / (2 ** bits - 1) / 2``, and the rounding of the dtype; a head of a token
    takes ``D * bits / 8`` bytes, and 8 for two numbers (16 with float64); the shares above are with
    D = 64. A token is encoded once, by itself: what comes back does not depend on the chunks in
    which it came, and the new tokens come back with the error too.

    With 8 bits the CPU kernel reads a step of decoding from the codes. Otherwise all tokens are
    decoded when they are looked at, into memory that is free again after it.

    Args:
        bits: 8 or 4.

    Raises:
        TypeError: ``bits`` is no integer.
        ValueError: It is another.
    """

    wants_even_keys = True
    """The codes spread over all features of a head: none may be far larger than the others."""

    _part_names = ("key_codes", "key_steps", "value_codes", "value_steps")

    def __init__(self, bits: int = 8) -> None:
        bits = check_integer("bits", bits)
        if bits not in (8, 4):
            raise ValueError(f"bits must be 8 or 4; got {bits}")
        super().__init__()
        self.bits = bits

    def _encode(self, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        checks.check_no_gradient("QuantizedCache", key, value)
        return *quantize(key, self.bits), *quantize(value, self.bits)

    def _decode(self, form: Form, parts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        key_codes, key_steps, value_codes, value_steps = parts
        pairs = (key_codes, key_steps, form.head_dim), (value_codes, value_steps, form.value_dim)
        if self.bits == 8 and can_defer(key_codes):
            store = Codes(key_codes, value_codes, key_steps[..., 0], value_steps[..., 0])
            return _stand_ins(store, form, parts, (form.head_dim, form.value_dim))
        key, value = (
            dequantize(codes, steps, self.bits, size, form.dtype) for codes, steps, size in pairs
        )
        return key, value

    def _part_forms(self, form: Form) -> tuple[tuple[int, torch.dtype], ...]:
        wide = wide_dtype(form.dtype)
        forms: list[tuple[int, torch.dtype]] = []
        for size in (form.head_dim, form.value_dim):
            forms += [(_num_bytes(size, self.bits) + wide.itemsize, torch.int8), (1, wide)]
        return tuple(forms)


def quantize(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes of features, and what they stand for.

    Args:
        x: ``(..., D)``.
        bits: 8 or 4.

    Returns:
        int8 ``(..., D * bits / 8 + digits)``, rounded up: codes, and the integer that is to be
        added to them, in 4 digits, or 8 for float64, of base 256, the lowest first. With 4 bits the
        even feature is in the lower half of its byte. And ``(..., 1)``, the step, in float32 or,
        for float64, float64: a feature is the step times the sum of code and integer. A NaN or an
        infinity makes the whole last dimension NaN.
    """
    levels = 2**bits - 1
    wide = x.to(wide_dtype(x.dtype))
    finfo = torch.finfo(wide.dtype)
    least, greatest = wide.aminmax(dim=-1, keepdim=True)
    # No finer than the dtype, so that every multiple of the step is an integer that it can hold.
    finest = torch.maximum(least.abs(), greatest.abs()) * finfo.eps
    step = torch.maximum((greatest - least) / levels, finest).clamp(min=finfo.tiny)
    first = _multiple(least, step)
    codes = (_multiple(wide, step) - first).clamp(0, levels)
    middle = first + 128 if bits == 8 else first
    packed = (codes - 128).to(torch.int8) if bits == 8 else _packed(codes)
    return torch.cat((packed, _digits(middle)), dim=-1), step


def dequantize(codes: Tensor, steps: Tensor, bits: int, size: int, dtype: torch.dtype) -> Tensor:
    """The inverse of `quantize`, to half a step: ``(..., size)`` in ``dtype``."""
    packed, digits = codes.split((_num_bytes(size, bits), steps.dtype.itemsize), dim=-1)
    if bits == 4:
        packed = torch.stack((packed & 15, packed >> 4 & 15), dim=-1).flatten(-2)[..., :size]
    # Made on the device, which need not be waited for; products of powers of two are exact.
    powers = steps.new_full((digits.shape[-1],), 256.0).cumprod(0) / 256.0
    middle = (digits * powers).sum(-1, keepdim=True)
    found: Tensor = packed.to(steps.dtype).add_(middle).mul_(steps).to(dtype)
    return found


def _multiple(x: Tensor, step: Tensor) -> Tensor:
    """Which multiple of the step is next to ``x``; of two as near the upper, so that numbers whole
    steps apart are as many multiples apart."""
    return (x / step + 0.5).floor_().nan_to_num_(0.0)


def _packed(codes: Tensor) -> Tensor:
    """Two codes of 4 bits a byte."""
    codes = codes.to(torch.uint8)
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return (codes[..., ::2] | codes[..., 1::2] << 4).view(torch.int8)


def _digits(numbers: Tensor) -> Tensor:
    """Integers ``(..., 1)`` as int8 ``(..., digits)``, of -128 to 127 each, the lowest first."""
    kind = torch.int32 if numbers.itemsize == 4 else torch.int64
    half = int.from_bytes(b"\x80" * (numbers.itemsize - 1), "little")
    # The bytes of a number have 0 to 255, but for the last; 128 more, and less again, moves them.
    return (numbers.to(kind) + half ^ half).view(torch.int8)


def _num_bytes(size: int, bits: int) -> int:
    return -(-size * bits // 8)


def _stand_ins(
    store: Codes, form: Form, parts: tuple[Tensor, ...], sizes: tuple[int, int]
) -> tuple[StoredTensor, StoredTensor]:
    """The keys and the values of all tokens, to be decoded when they are looked at."""
    versions = [part._version for part in parts]

    def check() -> None:
        if versions != [part._version for part in parts]:
            raise RuntimeError(
                "these keys and values were not looked at before, and cannot be now: the "
                "QuantizedCache has written over them"
            )

    length = store.key.shape[2]
    made = []
    for is_value, size in enumerate(sizes):
        codes, steps = parts[2 * is_value : 2 * is_value + 2]
        stand_in = StoredTensor.of(
            store,
            (form.batch, form.heads, length, size),
            (form.heads * length * size, length * size, size, 1),
            form.dtype,
            is_value=bool(is_value),
            read=partial(dequantize, codes, steps, 8, size, form.dtype),
            check=check,
        )
        made.append(stand_in)
    return made[0], made[1]
