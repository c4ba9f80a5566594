"""Biases against their definitions."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from zeta import biases
from zeta.positions import alibi_slopes, t5_buckets
from zeta.values import Tile


def test_bucketed_looks_the_offset_up() -> None:
    table = torch.randn(8, 3)
    dense = biases.Bucketed(table, max_distance=9).dense(2, 3, 5, 12)
    for i in range(5):
        for j in range(12):
            bucket = t5_buckets(torch.tensor(j - (7 + i)), num_buckets=8, max_distance=9)
            assert torch.equal(dense[1, :, i, j], table[bucket])


def test_alibi_falls_with_the_distance() -> None:
    dense = biases.Alibi(torch.tensor([1.0, 0.5])).dense(1, 2, 3, 4)
    expected = torch.tensor([[1, 0, 1, 2], [2, 1, 0, 1], [3, 2, 1, 0]]) * -1.0
    assert torch.equal(dense[0, 0], expected)
    assert torch.equal(dense[0, 1], expected / 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_slopes_are_multiplied_in_float32_or_wider(dtype: torch.dtype) -> None:
    slopes = torch.tensor([1.0, 0.3], dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    found = biases.Alibi(slopes).at(torch.tensor([-4097, 3]))
    assert torch.equal(found, torch.tensor([[-4097], [-3]], dtype=wide) * slopes.to(wide))


def test_slopes_are_multiplied_in_the_precision_of_the_scores() -> None:
    slopes = torch.tensor([0.3, 0.7])
    scores = torch.zeros(1, 2, 1, 9, dtype=torch.float64)
    found = biases.Alibi(slopes).apply(scores, Tile.whole(1, 9))
    distance = torch.arange(8, -1, -1, dtype=torch.float64)
    assert torch.equal(found[0, :, 0], -distance * slopes.double()[:, None])


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("max_distance", [20, 128])
@pytest.mark.parametrize("length", [5, 40, 300])
def test_the_offset_vector_says_all(bidirectional: bool, max_distance: int, length: int) -> None:
    table = torch.randn(32, 2)
    for bias in (
        biases.Bucketed(table, bidirectional=bidirectional, max_distance=max_distance),
        biases.Alibi(torch.rand(2)),
    ):
        reach = bias.reach(length - 1)
        assert reach <= length - 1
        vector = bias.offset_vector(reach)
        offset = torch.arange(length) - torch.arange(length)[:, None]
        from_vector = vector[:, offset.clamp(-reach, reach) + reach]
        assert torch.equal(from_vector, bias.dense(1, 2, length, length)[0])


def test_a_sum_is_applied_in_order() -> None:
    tensor, scores = torch.randn(1, 1, 3, 3), torch.randn(1, 1, 3, 3) * 4
    tile = Tile.whole(3, 3)
    capped_first = (biases.Softcap(2.0) + biases.Dense(tensor)).apply(scores, tile)
    torch.testing.assert_close(capped_first, 2 * torch.tanh(scores / 2) + tensor)
    capped_last = (biases.Dense(tensor) + biases.Softcap(2.0)).apply(scores, tile)
    torch.testing.assert_close(capped_last, 2 * torch.tanh((scores + tensor) / 2))


def test_flatten_and_unflatten_are_inverse() -> None:
    bias = (
        biases.Softcap(3.0)
        + biases.Bucketed(torch.randn(8, 2), bidirectional=False, max_distance=7)
        + (biases.Alibi(torch.rand(2)) + biases.Dense(torch.randn(1, 2, 1, 4)))
    )
    assert len(biases.summands(bias)) == 4
    spec, tensors = bias.flatten()
    again = biases.Bias.unflatten(spec, tensors)
    scores, tile = torch.randn(1, 2, 4, 4), Tile.whole(4, 4)
    assert torch.equal(again.apply(scores, tile), bias.apply(scores, tile))


def test_numbers_of_numpy_are_numbers() -> None:
    numbers = np.array([3, 20])
    bias = biases.Softcap(np.float32(3.0)) + biases.Softcap(np.float64(3.0))
    bias = bias + biases.Softcap(numbers[0])
    bias = bias + biases.Bucketed(torch.randn(8, 2), max_distance=numbers[1])
    again = biases.Bias.unflatten(*bias.flatten())
    scores, tile = torch.randn(1, 2, 4, 4), Tile.whole(4, 4)
    torch.testing.assert_close(again.apply(scores, tile), bias.apply(scores, tile))


def test_shape_is_the_shape_of_the_values() -> None:
    for bias in (
        biases.Dense(torch.randn(4)),
        biases.Dense(torch.randn(2, 1, 4, 4)),
        biases.Bucketed(torch.randn(8, 3)),
        biases.Alibi(alibi_slopes(3)),
    ):
        assert bias.shape(2, 3, 4, 4) == tuple(bias.values(Tile.whole(4, 4)).shape)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: biases.Softcap(0.0), ValueError, "limit must be positive and finite; got 0.0"),
        (lambda: biases.Softcap(float("inf")), ValueError, "positive and finite; got inf"),
        (
            lambda: biases.Softcap(float("nan")),
            ValueError,
            "positive and finite; got nan",
        ),
        (lambda: biases.Dense(torch.ones(2, dtype=torch.bool)), TypeError, "floating-point.*bool"),
        (lambda: biases.Dense(1.0), TypeError, "floating-point tensor.*float"),
        (lambda: biases.Bucketed(torch.randn(32)), ValueError, r"\(num_buckets, heads\)"),
        (
            lambda: biases.Bucketed(torch.randn(32, 2), max_distance=8),
            ValueError,
            "must exceed the 8 exact buckets",
        ),
        (lambda: biases.Bucketed(torch.randn(3, 2)), ValueError, "at least 1"),
        (
            lambda: biases.Bucketed(torch.randn(32, 2)).dense(1, 3, 2, 2),
            ValueError,
            "must have 3 heads; got 2",
        ),
        (lambda: biases.Alibi(torch.ones(2, 2)), ValueError, r"shape \(heads,\)"),
        (
            lambda: biases.Alibi([1.0]),
            TypeError,
            "slopes must be a floating-point tensor; got list",
        ),
        (
            lambda: biases.Alibi(torch.ones(2).int()),
            TypeError,
            "slopes .* got a torch.int32 tensor",
        ),
        (
            lambda: biases.Bucketed(torch.randn(32, 2), bidirectional="False"),
            TypeError,
            "bidirectional must be True or False; got 'False'",
        ),
        (lambda: biases.Bucketed([[1.0]]), TypeError, "table must be a floating-point .* got list"),
        (
            lambda: biases.Bucketed(torch.ones(32, 2).long()),
            TypeError,
            "table must be a floating-point tensor; got a torch.int64 tensor",
        ),
        (
            lambda: biases.Bucketed(torch.randn(32, 2), max_distance=64.5),
            TypeError,
            "max_distance must be an integer; got float",
        ),
        (lambda: biases.Softcap("3"), TypeError, "limit must be a number; got str"),
        (
            lambda: biases.Softcap(3.0) + torch.ones(2, 2),
            TypeError,
            "a bias joins biases; of a tensor biases.Dense makes one",
        ),
        (
            lambda: biases.Softcap(torch.tensor(3.0, requires_grad=True)),
            TypeError,
            "limit must be a number; got a torch.float32 tensor",
        ),
        (
            lambda: biases.Alibi(torch.ones(2)).dense(1, 3, 2, 2),
            ValueError,
            "for 3 heads; got 2",
        ),
        (
            lambda: biases.Dense(torch.ones(1, 2, 3, 3)).dense(1, 3, 3, 3),
            ValueError,
            "must broadcast to",
        ),
    ],
)
def test_bad_biases_are_refused(
    make: Callable[[], object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        make()
