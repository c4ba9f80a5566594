"""The bound that errors must keep, of every backend in every test."""

import torch
from torch import Tensor

HALF_FLOOR = 1 / 64
"""The least size that a rounding to half precision is relative to: sums are made in float32, so
what is left where large terms cancel is rounded as it is. In wider dtypes it is 1, as the terms.
"""


def assert_within_bound(
    actual: dict[str, Tensor],
    low: dict[str, Tensor],
    oracle: dict[str, Tensor],
    rounding: float | None = None,
) -> None:
    """Each result's error is at most twice that of ``low`` and one rounding.

    That is the root mean square of the error. The largest single error, whose ratio between two
    right ways to compute is a matter of luck, may be four times that of ``low``.

    Args:
        actual: What is tested.
        low: The reference in the precision of ``actual``.
        oracle: The reference in float64 on the same numbers.
        rounding: Relative to the size of the result, or to 1 if it is smaller, in half precision
            to `HALF_FLOOR`. By default that of the dtype; in float64, where the reference is the
            oracle, what another order costs.
    """
    assert actual.keys() == low.keys() == oracle.keys()
    for name, expected in oracle.items():
        got, rough = actual[name], low[name]
        assert got.shape == expected.shape, f"{name}: shape {got.shape}, expected {expected.shape}"
        assert got.dtype == rough.dtype, f"{name}: {got.dtype}, expected {rough.dtype}"
        eps = torch.finfo(got.dtype).eps
        unit = rounding or (64 * eps if got.dtype == torch.float64 else eps)
        floor = HALF_FLOOR if got.dtype in (torch.bfloat16, torch.float16) else 1.0
        got, rough = got.detach().cpu().double(), rough.detach().cpu().double()
        expected = expected.detach().cpu()
        finite = ~expected.isinf()
        assert torch.equal(got[~finite], expected[~finite]), f"{name}: infinities differ"
        if not finite.any():
            continue
        error, allowed, size = ((t[finite]) for t in (got - expected, rough - expected, expected))
        for measure, factor, norm in (("rms", 2, _rms), ("largest", 4, _largest)):
            bound = factor * norm(allowed) + unit * max(norm(size), floor)
            found = norm(error)
            assert found <= bound, f"{name}: {measure} error {found:.3g} exceeds {bound:.3g}"


def _rms(tensor: Tensor) -> float:
    return tensor.square().mean().sqrt().item()


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item()
