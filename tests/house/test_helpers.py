"""The tests' own comparisons fail on every kind of wrong value."""

import pytest
import torch
from torch import Tensor

from tests.ops.bound import assert_within_bound

Results = dict[str, Tensor]


@pytest.fixture
def results() -> tuple[Results, Results]:
    """Results in float32 with some error, and what they should be."""
    oracle = torch.randn(4, 5, dtype=torch.float64)
    oracle[0, 0] = float("-inf")
    low = oracle.float()
    low[1] += 1e-3
    return {"out": low}, {"out": oracle}


def changed(results: Results, row: int, by: float) -> Results:
    out = results["out"].clone()
    out[row] = by if by != by or abs(by) == float("inf") else out[row] + by
    return {"out": out}


def test_the_same_error_is_accepted(results: tuple[Results, Results]) -> None:
    low, oracle = results
    assert_within_bound(low, low, oracle)
    assert_within_bound({"out": oracle["out"].float()}, low, oracle)
    assert_within_bound(changed(low, 2, 1.6e-3), low, oracle)


@pytest.mark.parametrize("by", [2.2e-3, -2.2e-3, float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("row", [0, 2])
def test_a_wrong_number_fails(results: tuple[Results, Results], row: int, by: float) -> None:
    low, oracle = results
    with pytest.raises(AssertionError, match="out"):
        assert_within_bound(changed(low, row, by), low, oracle)


def test_a_single_large_error_fails(results: tuple[Results, Results]) -> None:
    _, oracle = results
    low = {"out": oracle["out"].float() + 1e-3}
    actual = {"out": low["out"].clone()}
    actual["out"][3, 4] += 2.5e-3
    assert_within_bound(actual, low, oracle)
    actual["out"][3, 4] += 1e-3
    with pytest.raises(AssertionError, match="largest error"):
        assert_within_bound(actual, low, oracle)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_small_error_of_small_results_fails_in_half_precision(dtype: torch.dtype) -> None:
    oracle = {"out": torch.randn(40, 5, dtype=torch.float64) / 100}
    low = {"out": oracle["out"].to(dtype)}
    assert_within_bound(low, low, oracle)
    wrong = {"out": low["out"] + 4 * torch.finfo(dtype).eps / 64}
    with pytest.raises(AssertionError, match="rms error"):
        assert_within_bound(wrong, low, oracle)


def test_a_lost_infinity_fails(results: tuple[Results, Results]) -> None:
    low, oracle = results
    with pytest.raises(AssertionError, match="infinities differ"):
        assert_within_bound({"out": low["out"].nan_to_num(neginf=0.0)}, low, oracle)


def test_a_broken_reference_gives_no_allowance(results: tuple[Results, Results]) -> None:
    low, oracle = results
    with pytest.raises(AssertionError):
        assert_within_bound(low, changed(low, 1, float("nan")), oracle)


def test_another_shape_dtype_or_name_fails(results: tuple[Results, Results]) -> None:
    low, oracle = results
    with pytest.raises(AssertionError, match="shape"):
        assert_within_bound({"out": low["out"][:1]}, low, oracle)
    with pytest.raises(AssertionError, match="float64"):
        assert_within_bound(oracle, low, oracle)
    with pytest.raises(AssertionError):
        assert_within_bound({**low, "more": low["out"]}, low, oracle)
