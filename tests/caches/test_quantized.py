"""`QuantizedCache`: its error is within the bound that it documents, and its size what it says."""

import math

import pytest
import torch

import zeta
from tests.caches.interfaces import tokens
from zeta.caches import QuantizedCache
from zeta.caches.quantized import dequantize, quantize


@pytest.mark.parametrize("size", [1, 2, 5, 64])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_feature_is_within_half_a_step(bits: int, size: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, 2, 50, size) * torch.logspace(-3, 3, 50)[:, None]
    # Far from 0 too, and with the strides of heads that lie inside of the length.
    x = (x + torch.tensor([0.0, 1.0, -1e3, 3e4] * 12 + [3.0] * 2)[:, None]).to(dtype)
    x = x.transpose(1, 2).contiguous().transpose(1, 2)
    codes, steps = quantize(x, bits)
    assert codes.shape[-1] == math.ceil(size * bits / 8) + steps.itemsize
    error = (dequantize(codes, steps, bits, size, dtype) - x).double().abs()
    spread = (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)).double()
    rounding = torch.finfo(dtype).eps * x.double().abs().amax(-1, keepdim=True)
    half_a_step = spread / (2**bits - 1) / 2
    assert (error <= half_a_step * (1 + 1e-5) + 2 * rounding).all()
    if size > 4:
        assert error.max() > 0


@pytest.mark.parametrize("bits", [8, 4])
def test_equal_features_and_the_ends_are_exact(bits: int) -> None:
    x = torch.tensor([[3.25, 3.25, 3.25], [0.0, 0.0, 0.0], [-1.0, 0.5, 2.0]])
    found = dequantize(*quantize(x, bits), bits, 3, x.dtype)
    assert torch.equal(found[:2], x[:2])
    torch.testing.assert_close(found[2, [0, 2]], x[2, [0, 2]])


def test_a_step_that_was_rounded_down_leads_to_no_code_too_many() -> None:
    x = torch.tensor([[101.17707061767578, 94.93685913085938], [-82.14215087890625, 83.440834045]])
    found = dequantize(*quantize(x, 8), 8, 2, x.dtype)
    half_a_step = (x[:, :1] - x[:, 1:]).abs() / 255 / 2
    assert ((found - x).abs() <= half_a_step * (1 + 1e-3)).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_nan_stays_nan(bits: int) -> None:
    x = torch.tensor([[1.0, torch.nan, 2.0], [1.0, 2.0, 3.0]])
    found = dequantize(*quantize(x, bits), bits, 3, x.dtype)
    assert found[0].isnan().all()
    assert not found[1].isnan().any()


@pytest.mark.parametrize("bits", [8, 4])
def test_chunks_do_not_matter(bits: int) -> None:
    whole, pieces = QuantizedCache(bits), QuantizedCache(bits)
    key, value = tokens(9)
    expected = whole.update(key, value)
    for part in zip(key.split([4, 1, 4], dim=2), value.split([4, 1, 4], dim=2), strict=True):
        found = pieces.update(*part)
    assert torch.equal(found.key, expected.key)
    assert torch.equal(found.value, expected.value)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_error_of_attention_is_bounded(bits: int) -> None:
    """From half a step per feature: scores off by e, weights by exp(2e) - 1 in all."""
    cache = QuantizedCache(bits)
    query, key, value = (torch.randn(2, 4, 100, 64, dtype=torch.float64) for _ in range(3))
    cached = cache.update(key, value)
    exact = zeta.attention(query, key, value, backend="reference")
    found = zeta.attention(query, cached.key, cached.value, backend="reference")

    def half_a_step(x: torch.Tensor) -> torch.Tensor:
        return (x.amax(-1) - x.amin(-1)).max() / (2**bits - 1) / 2

    of_scores = query.abs().sum(-1).max() * half_a_step(key) / 8
    bound = half_a_step(value) + torch.expm1(2 * of_scores) * value.abs().max()
    assert (found - exact).abs().max() <= bound


@pytest.mark.parametrize(
    ("bits", "dtype", "bound"), [(8, torch.bfloat16, 0.6), (4, torch.float32, 0.2)]
)
def test_it_is_smaller(bits: int, dtype: torch.dtype, bound: float) -> None:
    cache = QuantizedCache(bits)
    key = torch.randn(1, 2, 127, 64, dtype=dtype)
    cache.update(key, key)
    plain = 2 * 2 * 128 * 64 * key.element_size()
    assert cache.nbytes == 2 * 2 * 128 * (64 * bits // 8 + 8)
    assert cache.nbytes < bound * plain
