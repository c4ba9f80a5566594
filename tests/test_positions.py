"""The maths of positions against their formulas."""

import math

import pytest
import torch

from zeta.positions import (
    alibi_slopes,
    angle_tables,
    rotary_frequencies,
    rotary_tables,
    rotate,
    t5_buckets,
    xpos_scale,
)


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotation_is_complex_multiplication(interleaved: bool) -> None:
    x, positions = torch.randn(2, 5, 8, dtype=torch.float64), torch.arange(3, 8)
    cos, sin = rotary_tables(positions, 8, dtype=torch.float64)
    turned = rotate(x, cos, sin, interleaved=interleaved)
    for n in range(5):
        for p in range(4):
            first, second = (2 * p, 2 * p + 1) if interleaved else (p, p + 4)
            angle = (n + 3) * 10000.0 ** (-2 * p / 8)
            before = torch.complex(x[:, n, first], x[:, n, second])
            after = before * complex(math.cos(angle), math.sin(angle))
            torch.testing.assert_close(turned[:, n, first], after.real)
            torch.testing.assert_close(turned[:, n, second], after.imag)


def test_only_the_difference_of_positions_reaches_a_score() -> None:
    q, k = torch.randn(2, 64, dtype=torch.float64)

    def score(query_at: int, key_at: int) -> torch.Tensor:
        at = torch.tensor([query_at, key_at])
        cos, sin = rotary_tables(at, 64, dtype=torch.float64)
        scale = xpos_scale(at, 64, dtype=torch.float64)
        turned_q = rotate(q, cos[0] * scale[0], sin[0] * scale[0])
        turned_k = rotate(k, cos[1] / scale[1], sin[1] / scale[1])
        return turned_q @ turned_k

    torch.testing.assert_close(score(9, 4), score(105, 100))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tables_of_any_frequencies(dtype: torch.dtype) -> None:
    positions, frequencies = (
        torch.tensor([0, 3, 9000]),
        torch.tensor([2.0, 0.125, 0.0], dtype=dtype),
    )
    cos, sin = angle_tables(positions, frequencies, dtype=torch.float64)
    angles = torch.tensor([[0.0] * 3, [6.0, 0.375, 0.0], [18000.0, 1125.0, 0.0]]).double()
    torch.testing.assert_close(cos, angles.cos(), rtol=0, atol=1e-10)
    torch.testing.assert_close(sin, angles.sin(), rtol=0, atol=1e-10)


def test_frequencies_are_powers_of_the_base() -> None:
    found = rotary_frequencies(8, base=81.0)
    torch.testing.assert_close(found, torch.tensor([1.0, 1 / 3, 1 / 9, 1 / 27]).double())
    assert rotary_frequencies(8, dtype=torch.float32).dtype == torch.float32
    for of_angles in (torch.float64, torch.float32):
        tables = rotary_tables(torch.arange(9), 8, base=81.0, angle_dtype=of_angles)
        same = angle_tables(torch.arange(9), rotary_frequencies(8, base=81.0, dtype=of_angles))
        assert all(torch.equal(one, other) for one, other in zip(tables, same, strict=True))


def test_tables_keep_their_precision_at_far_positions() -> None:
    far = torch.tensor([2**24 - 1])
    cos, sin = rotary_tables(far, 64)
    exact_cos, exact_sin = rotary_tables(far, 64, dtype=torch.float64)
    assert (cos - exact_cos).abs().max() < 1e-7
    assert (sin - exact_sin).abs().max() < 1e-7


def test_a_rotation_keeps_the_dtype_and_works_in_the_precision_of_the_tables() -> None:
    x = torch.randn(100, 64, dtype=torch.bfloat16)
    cos, sin = rotary_tables(torch.arange(4000, 4100), 64)
    turned = rotate(x, cos, sin)
    assert turned.dtype == torch.bfloat16
    exact = rotate(x.double(), *rotary_tables(torch.arange(4000, 4100), 64, dtype=torch.float64))
    assert ((turned.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()


@pytest.mark.parametrize("head_dim", [7, 0, -2])
def test_an_odd_head_dim_cannot_be_rotated(head_dim: int) -> None:
    with pytest.raises(ValueError, match=f"even and positive.*got {head_dim}"):
        rotary_tables(torch.arange(3), head_dim)


def test_buckets_are_exact_nearby_and_logarithmic_further() -> None:
    distance = torch.arange(0, 200)
    past = t5_buckets(-distance, bidirectional=False)
    assert past[:16].tolist() == list(range(16))
    expected = [
        min(31, 16 + int(math.log(d / 16) / math.log(128 / 16) * 16 + 1e-9)) for d in range(16, 200)
    ]
    assert past[16:].tolist() == expected
    assert (past[128:] == 31).all()


def test_keys_after_the_query_have_their_own_half_of_the_buckets() -> None:
    offset = torch.arange(-300, 301)
    buckets = t5_buckets(offset)
    assert (buckets[offset > 0] >= 16).all()
    assert (buckets[offset <= 0] < 16).all()
    assert torch.equal(buckets[offset > 0], buckets[offset < 0].flip(0) + 16)
    assert (t5_buckets(offset, bidirectional=False)[offset >= 0] == 0).all()


@pytest.mark.parametrize(
    ("options", "num_exact"),
    [
        ({"num_buckets": 2}, 0),
        ({"num_buckets": 1, "bidirectional": False}, 0),
        ({"max_distance": 4}, 8),
        ({"max_distance": 16, "bidirectional": False}, 16),
    ],
)
def test_buckets_that_would_not_grow_are_refused(options: dict[str, int], num_exact: int) -> None:
    with pytest.raises(
        ValueError, match=f"must exceed the {num_exact} exact buckets .* at least 1"
    ):
        t5_buckets(torch.arange(5), **options)


@pytest.mark.parametrize("heads", [1, 2, 8, 12, 20])
def test_alibi_slopes_are_a_geometric_sequence(heads: int) -> None:
    slopes = alibi_slopes(heads)
    power = 2 ** int(math.log2(heads))
    assert slopes.shape == (heads,)
    torch.testing.assert_close(slopes[0], torch.tensor(2.0 ** (-8 / power)))
    torch.testing.assert_close(slopes[power - 1], torch.tensor(2.0**-8))
    assert slopes.unique().numel() == heads


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_alibi_slopes_are_float32_whatever_the_default_dtype(dtype: torch.dtype) -> None:
    expected = alibi_slopes(12)
    torch.set_default_dtype(dtype)
    try:
        found = alibi_slopes(12)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_alibi_slopes_need_a_head() -> None:
    with pytest.raises(ValueError, match="num_heads must be positive; got 0"):
        alibi_slopes(0)
