"""The numbers that sampling draws by: those of the formula, evenly spread, each place's its own."""

import pytest
import torch
from torch import Tensor

from zeta.generation import drawing
from zeta.generation.drawing import Uniforms


def numbers(seed: int, places: int, draws: int) -> Tensor:
    """``(draws, places)``."""
    uniforms = Uniforms(seed)
    return torch.stack([uniforms(torch.arange(places)) for _ in range(draws)])


def mixed(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


@pytest.mark.parametrize("seed", [0, 1, -1, 2**40 + 3, 2**64 - 2, -(2**63)])
def test_numbers_are_those_of_the_formula(seed: int) -> None:
    found = numbers(seed, 70, 9)
    for draw in range(9):
        state = mixed(seed % 2**64) + (draw + 1) * 0xD1B54A32D192ED03
        expected = [
            (mixed((state + place * 0x9E3779B97F4A7C15) % 2**64) >> 11) / 2**53
            for place in range(70)
        ]
        assert found[draw].tolist() == expected


def test_only_tokens_that_can_be_are_drawn_whatever_the_total() -> None:
    greatest = 1 - 2.0**-53
    least = 5e-324  # Whose product with the greatest is itself.
    for probability, uniform, token in (
        ([0.0, 1.0], 0.0, 1),
        ([least, 0.0], greatest, 0),
        ([0.25, 0.25], 0.4, 0),
        ([0.25, 0.25], 0.5, 1),
    ):
        found = drawing.draw(
            torch.tensor([probability], dtype=torch.float64),
            torch.tensor([uniform], dtype=torch.float64),
        )
        assert found.tolist() == [token]


def test_a_place_keeps_its_numbers_whatever_its_neighbours() -> None:
    together = numbers(5, 9, 4)
    for rows in ([0], [3], [8, 2], [0, 1, 2, 3]):
        uniforms = Uniforms(5)
        for draw in range(4):
            assert torch.equal(uniforms(torch.tensor(rows)), together[draw, rows])


def test_numbers_are_spread_evenly_and_apart() -> None:
    """Alone, and in pairs of neighbours by place, draw and seed: a chi-squared test of cells."""
    found = torch.stack([numbers(seed, 64, 64) for seed in range(16)])
    assert found.min() >= 0
    assert found.max() < 1
    assert len(found.unique()) == found.numel()
    cells = (found * 16).long()
    counts = [cells.flatten().bincount(minlength=16)]
    for dim in range(3):
        first, second = cells.narrow(dim, 0, found.shape[dim] - 1), cells.roll(-1, dim)
        second = second.narrow(dim, 0, found.shape[dim] - 1)
        counts.append((first * 16 + second).flatten().bincount(minlength=256))
    for count in counts:
        expected = count.sum() / len(count)
        squared = float(((count - expected) ** 2 / expected).sum())
        # Of mean n and variance 2 n, for n degrees of freedom: five standard deviations.
        freedom = len(count) - 1
        assert abs(squared - freedom) < 5 * (2 * freedom) ** 0.5
