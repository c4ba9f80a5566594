"""Whether what is timed is right: errors of a piece of work, against float64."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from benchmarks.cpu_problem import Run

PEER_FACTOR = 8
"""A peer must do the same work, not as exactly."""
ROW_FACTOR = 16
"""A row of a result, a query's or a key's, may be off by this much more than all of them."""


def check(
    oracle: Run, checked: Mapping[str, Run], bound: float, *, is_peer_rough: bool = False
) -> dict[str, dict[str, float]]:
    """The errors of each side, root mean squares relative to that of the result.

    Args:
        oracle: The same in float64.
        checked: The sides, of which ``"ours"`` keeps the bound.
        bound: Of these errors.
        is_peer_rough: Whether the gradients of the others say nothing.

    Raises:
        AssertionError: One exceeds its bound.
    """
    expected = oracle()
    torch.use_deterministic_algorithms(True)  # Which fills memory that is not written with NaN.
    try:
        found = {name: run() for name, run in checked.items()}
    finally:
        torch.use_deterministic_algorithms(False)
    errors: dict[str, dict[str, float]] = {}
    for side, results in found.items():
        errors[side] = {}
        for name, result in results.items():
            if name in expected:
                errors[side][name] = relative_error(result, expected[name])
                allowed = _allowed(bound, side, name, is_peer_rough)
                fault = _fault(result, expected[name], allowed)
                if fault:
                    raise AssertionError(f"{side}, {name}: {fault} exceeds {allowed:.2g}")
    return errors


def _allowed(bound: float, side: str, name: str, is_peer_rough: bool) -> float:
    if side == "ours":
        return bound
    is_gradient = name not in ("out", "weights")
    return math.inf if is_gradient and is_peer_rough else PEER_FACTOR * bound


def _fault(actual: Tensor, expected: Tensor, bound: float) -> str:
    """What of a result is too far off, if anything: all of it, or one of its rows."""
    error = relative_error(actual, expected)
    if not error <= bound:  # NaN too
        return f"error {error:.2g}"
    sizes, errors = _by_row(expected), _by_row(actual.detach().double() - expected)
    worst = (errors / sizes.clamp(min=sizes.square().mean().sqrt())).max().item()
    return "" if worst <= ROW_FACTOR * bound else f"error {worst:.2g} / {ROW_FACTOR} of a row"


def _by_row(x: Tensor) -> Tensor:
    return x.square().mean(-1).sqrt().clamp(min=1e-30)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the error over that of ``expected``."""
    error = (actual.detach().double() - expected).square().mean().sqrt()
    return (error / expected.square().mean().sqrt().clamp(min=1e-30)).item()
