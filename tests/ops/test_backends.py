"""Every backend on one grid: outputs and all gradients against the reference in float64."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.ops.bound import assert_within_bound
from tests.ops.cases import (
    CASES,
    REFUSED,
    Case,
    Made,
    expected,
    expected_both,
    expected_weights,
    reasons,
    taken,
    widened,
)
from zeta import BackendUnsupported, attention, biases, masks
from zeta.ops.attention import run_with_weights
from zeta.ops.call import AttentionCall

EXACT = ("reference", "chunked")
"""The backends that must do every call."""
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# torch's CPU kernel takes its float32 exponentials to 20 bits.
ROUNDING = {("sdpa", torch.float32): 2.0**-20}
GRID = [
    *(("chunked", case, dtype) for case in taken("chunked") for dtype in DTYPES),
    *(("sdpa", case, dtype) for case in taken("sdpa") for dtype in DTYPES),
    *(("cpu", case, dtype) for case in taken("cpu") for dtype in DTYPES[1:]),
]
OF_WEIGHTS = [
    *(("chunked", case, dtype) for case in taken("chunked") for dtype in DTYPES[:3]),
    *(("cpu", case, dtype) for case in taken("cpu") for dtype in DTYPES[1:]),
]


def _id(value: object) -> str:
    return value.name if isinstance(value, Case) else str(value)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("backend", "case", "dtype"), GRID, ids=_id)
def test_outputs_and_gradients(backend: str, case: Case, dtype: torch.dtype) -> None:
    lse = backend != "sdpa"
    actual = case.run(case.tensors(dtype), backend, lse=lse)
    low, oracle = expected(case, dtype, lse=lse)
    assert_within_bound(actual, low, oracle, ROUNDING.get((backend, dtype)))


@pytest.mark.parametrize(
    ("backend", "case"),
    [(name, case) for name in ("sdpa", "cpu") for case in CASES if case.name in REFUSED[name]],
    ids=_id,
)
def test_a_backend_refuses_what_it_cannot_do_and_says_why(backend: str, case: Case) -> None:
    with pytest.raises(BackendUnsupported) as refusal:
        case.run(case.tensors(torch.float32), backend, lse=False)
    said = reasons(case, backend)
    assert said
    for reason in said:
        assert reason in str(refusal.value)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("reduce", [None, "mean"])
@pytest.mark.parametrize(
    ("backend", "case", "dtype"), [one for one in OF_WEIGHTS if not one[1].dropout_p], ids=_id
)
def test_weights_and_gradients(
    backend: str, case: Case, dtype: torch.dtype, reduce: str | None
) -> None:
    actual = case.run_weights(case.tensors(dtype), backend, reduce)
    assert_within_bound(actual, *expected_weights(case, dtype, reduce))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("reduce", [None, "mean"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", taken("cpu"), ids=_id)
def test_output_and_weights_at_once(case: Case, dtype: torch.dtype, reduce: str | None) -> None:
    actual = case.run_both(case.tensors(dtype), "cpu", reduce)
    assert_within_bound(actual, *expected_both(case, dtype, reduce))


def test_nan_that_no_query_sees_stays_out_of_an_output_with_weights() -> None:
    query, key, value = (torch.randn(1, 2, 300, 16) for _ in range(3))
    key[:, :, 150:] = value[:, :, 150:] = float("nan")
    call = AttentionCall.checked(query, key, value, mask=masks.Causal())
    out, weights = run_with_weights(call, mean=False, backend="cpu")
    alone = attention(query, key, value, mask=masks.Causal(), backend="cpu")
    assert torch.equal(out.isfinite(), alone.isfinite())
    assert out[:, :, :90].isfinite().all()
    assert weights[:, :, :150].isfinite().all()


def _ids(source: int) -> torch.Tensor:
    return torch.arange(source).div(source // 4 + 1, rounding_mode="floor").expand(2, -1)


def _pairs(*shape: int) -> masks.Mask:
    """Some of them; a key in the middle and the last one are for nobody."""
    kept = torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))) < 0.8
    kept[..., shape[-1] // 3] = kept[..., -1] = False
    return masks.keep(kept)


UNSEEN: dict[str, Callable[[int, int], masks.Mask]] = {  # of the lengths of queries and keys
    "padding": lambda _, source: masks.Padding(torch.tensor([source, source // 2])),
    "documents": lambda _, source: masks.Documents(_ids(source)),
    "documents, causal": lambda _, source: masks.Documents(_ids(source)) & masks.Causal(),
    "pairs": _pairs,
    "pairs of each head": lambda target, source: _pairs(1, 4, target, source),
    "keys of each head": lambda _, source: _pairs(1, 4, 1, source),
    "keys and pairs": lambda target, source: (
        masks.keep(torch.ones(target, source, dtype=torch.bool)) & _pairs(2, 1, 1, source)
    ),
    "later positions": lambda *_: masks.Causal(),
}
LENGTHS = [(1, 9), (3, 9), (30, 290), (110, 290)]


@pytest.mark.parametrize("backend", [*EXACT, "cpu"])
@pytest.mark.parametrize(("target", "source"), LENGTHS)
@pytest.mark.parametrize("name", UNSEEN)
def test_nan_in_keys_that_no_query_sees_does_not_leak(
    name: str, target: int, source: int, backend: str
) -> None:
    case = Case(
        name, target=target, source=source, key_heads=2, mask=lambda: UNSEEN[name](target, source)
    )
    if name == "later positions":
        at = list(range(source))
        places = [position + source * (position % 5 == 2) for position in at]
        case = dataclasses.replace(case, query_positions=[at[-target:]], key_positions=[places])
    clean, planted = case.tensors(torch.float32), case.tensors(torch.float32)
    call = AttentionCall.checked(
        clean["query"], clean["key"], clean["value"], **case.arguments(clean)
    )
    visible = call.visible(call.tile())
    assert visible is not None
    unseen = ~visible.expand(2, 4, target, source).any(2).unflatten(1, (2, 2)).any(2)
    assert unseen.any()
    with torch.no_grad():
        planted["key"][unseen] = planted["value"][unseen] = float("nan")

    def all_of(made: Made) -> dict[str, torch.Tensor]:
        found = {
            "": case.run(made, backend),
            "of weights": case.run_weights(made, backend, None),
            "of both": case.run_both(made, backend, None),
        }
        return {f"{part} {kind}": tensor for kind in found for part, tensor in found[kind].items()}

    without = all_of(clean)
    for part, tensor in all_of(planted).items():
        torch.testing.assert_close(tensor, without[part], msg=part)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("length", [45, 301])
@pytest.mark.parametrize("backend", ["chunked", "cpu"])
def test_biases_of_hidden_keys_do_not_matter(backend: str, length: int, bad: float) -> None:
    query, key, value = (torch.randn(1, 2, length, 16) for _ in range(3))
    table = torch.randn(32, 2)
    spoilt = table.clone()
    spoilt[17:] = bad  # Of the keys after a query.

    def results(table: Tensor) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (query, key, value, table)]
        bias = biases.Bucketed(leaves[3])
        out = attention(*leaves[:3], mask=masks.Causal(), bias=bias, backend=backend)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    for actual, without in zip(results(spoilt), results(table), strict=True):
        assert torch.equal(actual, without)


@pytest.mark.parametrize("backend", [*EXACT, "sdpa", "cpu"])
def test_nan_that_a_query_sees_passes_through(backend: str) -> None:
    query, key, value = (torch.randn(1, 1, 4, 8) for _ in range(3))
    key[0, 0, 2, 0] = float("nan")
    out = attention(query, key, value, mask=masks.Causal(), backend=backend)
    assert out[0, 0, :2].isfinite().all()
    assert out[0, 0, 2:].isnan().all()


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("backend", [*EXACT, "cpu"])
def test_a_nan_in_a_query_reaches_the_gradients(backend: str, dropout_p: float) -> None:
    leaves = [torch.randn(1, 1, length, 8, requires_grad=True) for length in (40, 50, 50)]
    with torch.no_grad():
        leaves[0][0, 0, 3, 0] = float("nan")
    out = attention(*leaves, dropout_p=dropout_p, seed=1, backend=backend)
    for grad in torch.autograd.grad(out.sum(), leaves):
        assert grad.isnan().any()


@pytest.mark.parametrize("backend", [*EXACT, "sdpa", "cpu"])
def test_a_query_without_keys_gets_zero_and_gives_no_gradient(backend: str) -> None:
    query, key, value = (torch.randn(2, 2, 5, 8, requires_grad=True) for _ in range(3))
    mask = masks.Padding(torch.tensor([5, 0]))
    out = attention(query, key, value, mask=mask, backend=backend)
    assert torch.equal(out[1], torch.zeros(2, 5, 8))
    for grad in torch.autograd.grad(out.sum(), (query, key, value)):
        assert torch.equal(grad[1], torch.zeros(2, 5, 8))


def test_the_bound_fails_on_wrong_values() -> None:
    case = Case("plain")
    made = case.tensors(torch.float32)
    low, oracle = case.run(made, "reference"), case.run(widened(made), "reference")
    for name in oracle:
        wrong = dict(low)
        wrong[name] = low[name] + 1e-5
        with pytest.raises(AssertionError, match=name):
            assert_within_bound(wrong, low, oracle)
