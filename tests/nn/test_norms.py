"""Norms of queries and keys in half precision, where squares are out of range."""

import pytest
import torch

from zeta.nn.norms import RMSNorm, UnitNorm


@pytest.mark.parametrize("size", [1e-4, 1.0, 6e4])
def test_a_unit_norm_is_taken_in_float32(size: float) -> None:
    x = (size * torch.tensor([[0.75, 1.0, 0.0, 0.0]] * 2)).half()
    found = UnitNorm(1e-6)(x)
    assert found.dtype == torch.float16
    expected = torch.tensor([0.6, 0.8, 0.0, 0.0], dtype=torch.float16).expand(2, 4)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_nothing_has_no_direction() -> None:
    assert torch.equal(UnitNorm(1e-6)(torch.zeros(2, 4)), torch.zeros(2, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_a_root_mean_square_is_taken_in_the_wider_dtype(dtype: torch.dtype) -> None:
    norm = RMSNorm(4, 0.5)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    x = torch.tensor([[300.0, 400.0, 0.0, -500.0], [0.1, 0.2, 0.3, 0.4]], dtype=dtype)
    found = norm(x)
    assert found.dtype == dtype
    wide = x.double()
    expected = wide * (wide.square().mean(-1, keepdim=True) + 0.5).rsqrt() * norm.weight.double()
    torch.testing.assert_close(found, expected.to(dtype))
