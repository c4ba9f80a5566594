"""`QuantizedCache`: keys and values in 8 or 4 bits.

Shapes: B batch, G key heads, N tokens, D head dimension.
"""

import torch
from torch import Tensor

from zeta.caches import checks
from zeta.caches.form import Form
from zeta.caches.growing import GrowingCache
from zeta.caches.interface import Cached


class QuantizedCache(GrowingCache):
    """Every token in a half to an eighth of the memory, with an error that is bounded.

    The features of one token in one head are spread evenly over the ``2 ** bits`` codes between
    their least and their greatest. So each feature is off by at most ``(greatest - least) / (2 **
    bits - 1) / 2``, and the rounding of the dtype; a head of a token takes ``D * bits / 8`` bytes,
    and 8 for the two numbers (16 with float64). A token is encoded once, by itself: what comes back
    does not depend on the chunks in which it came, and the new tokens come back with the error too.

    All tokens are decoded at every step, into memory that is free again after it.

    Args:
        bits: 8 or 4.

    Raises:
        ValueError: ``bits`` is something else.
    """

    wants_even_keys = True
    """The codes spread over all features of a head: none may be far larger than the others."""

    _part_names = ("key_codes", "key_ranges", "value_codes", "value_ranges")

    def __init__(self, bits: int = 8) -> None:
        if bits not in (8, 4):
            raise ValueError(f"bits must be 8 or 4; got {bits}")
        super().__init__()
        self.bits = bits

    def update(
        self,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        *,
        origin: Tensor | None = None,
    ) -> Cached:
        """See `GrowingCache`."""
        checks.check_no_gradient("QuantizedCache", key, value)
        return super().update(key, value, key_padding_mask, origin=origin)

    def _encode(self, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        return *quantize(key, self.bits), *quantize(value, self.bits)

    def _decode(self, form: Form, parts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        key_codes, key_ranges, value_codes, value_ranges = parts
        key = dequantize(key_codes, key_ranges, self.bits, form.head_dim, form.dtype)
        return key, dequantize(value_codes, value_ranges, self.bits, form.value_dim, form.dtype)

    def _part_forms(self, form: Form) -> tuple[tuple[int, torch.dtype], ...]:
        wide = torch.promote_types(form.dtype, torch.float32)
        forms: list[tuple[int, torch.dtype]] = []
        for size in (form.head_dim, form.value_dim):
            forms += [(_num_bytes(size, self.bits), torch.uint8), (2, wide)]
        return tuple(forms)


def quantize(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes of features, and what they stand for.

    Args:
        x: ``(..., D)``.
        bits: 8 or 4.

    Returns:
        ``(..., D * bits / 8)`` uint8, rounded up; with 4 bits the even feature is in the lower half
        of its byte. And ``(..., 2)``, the value of code 0 and the step from a code to the next, in
        float32 or, for float64, float64. A NaN or an infinity makes the whole last dimension NaN.
    """
    levels = 2**bits - 1
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    least, greatest = wide.aminmax(dim=-1, keepdim=True)
    step = (greatest - least) / levels
    nearest = ((wide - least) / torch.where(step > 0, step, 1.0)).round().clamp(0, levels)
    codes = nearest.nan_to_num(0.0).to(torch.uint8)
    if bits == 4:
        if codes.shape[-1] % 2:
            codes = torch.nn.functional.pad(codes, (0, 1))
        codes = codes[..., ::2] | codes[..., 1::2] << 4
    return codes, torch.cat((least, step), dim=-1)


def dequantize(codes: Tensor, ranges: Tensor, bits: int, size: int, dtype: torch.dtype) -> Tensor:
    """The inverse of `quantize`, to half a step: ``(..., size)`` in ``dtype``."""
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)[..., :size]
    least, step = ranges.split(1, dim=-1)
    return torch.addcmul(least, codes.to(ranges.dtype), step).to(dtype)


def _num_bytes(size: int, bits: int) -> int:
    return -(-size * bits // 8)
