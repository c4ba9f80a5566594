"""The native CPU kernels of every instruction set: the grid, on any processor.

What runs here where nothing is asked for is tested with the other backends. What multiplies pairs
of bfloat16 is emulated even where the processor has it: it does so there for the grid's few queries
and keys too, which the library proper leaves to the unit without pairs.
"""

import pytest
import torch

from tests.ops.bound import assert_within_bound
from tests.ops.cases import Case, expected, expected_both, expected_weights, far_from_zero, taken
from tests.ops.cpu import units
from zeta import attention, masks, set_float32_precision
from zeta.ops.backends.cpu import library

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(library.obstacle() is not None, reason=str(library.obstacle())),
]
# Rows of a key head that share its keys, past those that are decoded; several tiles of each side.
TILED = Case("tiled", target=150, source=170, head_dim=40, value_dim=72, key_heads=2, batch=1)
# Two blocks of keys.
FAR = far_from_zero(-1e9, target=30, source=290, key_heads=2, batch=1)

PAIRED = ("AVX-512 BF16", "AMX")
BEST = None if library.obstacle() else library.load().usable[-1]
UNITS = [pair for pair in units.ALL if pair[0] in PAIRED or pair[0] != BEST]


@pytest.fixture(autouse=True, params=UNITS, ids=lambda pair: f"{pair[0]} {pair[1]}")
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    name, found = request.param
    units.use(name, monkeypatch, emulated=name in PAIRED)
    assert isinstance(found, torch.dtype)
    return found


def _id(value: object) -> str:
    return value.name if isinstance(value, Case) else str(value)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", [*taken("cpu"), TILED, FAR], ids=_id)
def test_outputs_and_gradients(case: Case, dtype: torch.dtype) -> None:
    assert_within_bound(case.run(case.tensors(dtype), "cpu"), *expected(case, dtype))


@pytest.mark.parametrize("reduce", [None, "mean"])
@pytest.mark.parametrize(
    "name", ["plain", "t5 causal long", "padding with an empty sequence", FAR.name]
)
def test_weights_and_gradients(name: str, dtype: torch.dtype, reduce: str | None) -> None:
    (case,) = (case for case in [*taken("cpu"), FAR] if case.name == name)
    made = case.tensors(dtype)
    actual = case.run_weights(made, "cpu", reduce)
    assert_within_bound(actual, *expected_weights(case, dtype, reduce))
    both = case.run_both(made, "cpu", reduce)
    assert_within_bound(both, *expected_both(case, dtype, reduce))
    assert torch.equal(both["weights"], actual["weights"])


def test_nan_in_keys_that_no_query_sees_does_not_leak(dtype: torch.dtype) -> None:
    # The queries are of the last document alone.
    ids = torch.tensor([[0] * 21 + [1] * 69]).expand(2, -1)
    case = Case("last", target=60, source=90, key_heads=2, mask=lambda: masks.Documents(ids))
    clean, planted = case.tensors(dtype), case.tensors(dtype)
    with torch.no_grad():
        planted["key"][:, :, :21] = planted["value"][:, :, :21] = float("nan")
    without, actual = case.run(clean, "cpu"), case.run(planted, "cpu")
    without |= case.run_both(clean, "cpu", None)
    actual |= case.run_both(planted, "cpu", None)
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor, without[name], msg=name)


def test_numbers_in_padding_decide_nothing(dtype: torch.dtype) -> None:
    """Not even which unit multiplies, where some cannot take NaN apart."""
    query, key, value = torch.randn(3, 2, 2, 50, 40).to(dtype).unbind()
    mask = masks.Padding(torch.tensor([50, 30]))
    without = attention(query, key, value, mask=mask, backend="cpu")
    key[1, :, 30:], value[1, :, 30:] = float("nan"), float("inf")
    assert torch.equal(attention(query, key, value, mask=mask, backend="cpu"), without)


@pytest.mark.parametrize("dtype", [("AMX", torch.float32)], indirect=True, ids=["AMX"])
def test_float32_is_as_exact_as_is_asked_for(dtype: torch.dtype) -> None:
    made = TILED.tensors(dtype)
    operands = [made[name].detach() for name in ("query", "key", "value")]
    exact = attention(*(tensor.double() for tensor in operands), backend="reference")

    def error(**options: object) -> float:
        found = attention(*operands, backend="cpu", **options)  # type: ignore[arg-type]
        return ((found.double() - exact).norm() / exact.norm()).item()

    highest, high = error(precision="highest"), error(precision="high")
    assert highest < 1e-6
    assert 1e-6 < high < 3e-5
    assert error() == highest
    for precision in ("highest", "high"):
        shortest = attention(*operands, precision=precision)  # type: ignore[arg-type]
        assert torch.equal(
            shortest,
            attention(*operands, precision=precision, backend="cpu"),  # type: ignore[arg-type]
        )
    set_float32_precision("high")
    try:
        assert error() == high
        assert error(precision="highest") == highest
    finally:
        set_float32_precision(None)
