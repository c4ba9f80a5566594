"""Sums that several tasks share are made in one order, whatever the number of threads."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from tests.ops.bound import assert_within_bound
from tests.ops.cases import T5, Case, far_from_zero, widened
from tests.ops.cpu import units
from zeta import attention, biases, masks
from zeta.ops.backends.cpu import library

pytestmark = pytest.mark.skipif(library.obstacle() is not None, reason=str(library.obstacle()))

# Three blocks of keys and two of queries, two query heads to a key head.
SIZES = {"heads": 4, "key_heads": 2, "target": 110, "source": 550, "head_dim": 16}
SHAPES = [
    (2, 4, 110, 550),
    (1, 4, 110, 550),
    (2, 1, 110, 550),
    (1, 1, 110, 550),
    (2, 4, 1, 550),
    (1, 1, 1, 550),
    (2, 4, 110, 1),
    (2, 1, 110, 1),
    (1, 4, 110, 1),
    (1, 1, 110, 1),
    (1, 4, 1, 1),
]
CASES = [
    *(
        Case(
            f"dense {shape} {key_heads}",
            learned={"bias": shape},
            bias=lambda made: biases.Dense(made["bias"]),
            **{**SIZES, "key_heads": key_heads},
        )
        for shape in SHAPES
        for key_heads in (2, 1)
    ),
    Case("t5", **T5, **SIZES),
    Case("causal", mask=masks.Causal, **{**SIZES, "target": 550}),
    Case("window", mask=lambda: masks.SlidingWindow(40), **{**SIZES, "target": 550}),
]


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients_are_the_same_on_any_number_of_threads(case: Case) -> None:
    made = case.tensors(torch.float32)
    torch.set_num_threads(1)
    expected = case.run(made, "cpu")
    torch.set_num_threads(5)
    for _ in range(3):
        actual = case.run(made, "cpu")
        for name, tensor in expected.items():
            assert torch.equal(actual[name], tensor), name


# The gradient of a bias that all scores of a head share is that of lse alone: the rest cancels, and
# leaves rounding.
BOUNDED = [case for case in CASES if not case.name.startswith("dense (1, 4, 1, 1)")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", BOUNDED, ids=lambda case: case.name)
def test_gradients_of_many_blocks_keep_the_bound(case: Case, dtype: torch.dtype) -> None:
    made = case.tensors(dtype)
    actual, low = case.run(made, "cpu"), case.run(made, "reference")
    assert_within_bound(actual, low, case.run(widened(made), "reference"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_long_sums_are_exact(dtype: torch.dtype) -> None:
    # Each key's gradient is a sum over three thousand queries, in many blocks.
    case = Case("long", batch=1, heads=2, key_heads=1, target=1500, source=1500, head_dim=32)
    made = case.tensors(dtype)
    low, oracle = case.run(made, "reference"), case.run(widened(made), "reference")
    assert_within_bound(case.run(made, "cpu"), low, oracle)


@pytest.mark.usefixtures("unit")
@units.on_each(units.ALL, torch.bfloat16, torch.float16)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_learned_slopes_are_as_exact_as_the_weights(dropout_p: float, dtype: torch.dtype) -> None:
    # Distances make larger what is wrong in a row: a rounded output would be felt.
    case = Case(
        "slopes", batch=1, heads=4, key_heads=2, target=1000, source=1000, head_dim=48,
        mask=masks.Causal, dropout_p=dropout_p, learned={"slopes": (4,)},
        bias=lambda made: biases.Alibi(made["slopes"]),
    )  # fmt: skip
    made = case.tensors(dtype)
    with torch.no_grad():
        made["slopes"].fill_(-0.02)  # The farthest keys have the largest weights.
    low = case.run(made, "reference", lse=False)
    oracle = case.run(widened(made), "reference", lse=False)
    assert_within_bound(case.run(made, "cpu", lse=False), low, oracle)


LOWEST = torch.finfo(torch.float32).min
FAR = [
    far_from_zero(value, key_heads=2, target=target, source=source, head_dim=16, batch=1)
    for value, target, source in (
        (LOWEST, 5, 60), (-1e9, 5, 60), (LOWEST, 5, 300), (-1e9, 5, 300), (1e5, 5, 300),
        (-1e4, 5, 300), (-1e9, 110, 550),
    )
]  # fmt: skip


@pytest.mark.usefixtures("unit")
@units.on_each(units.ALL)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("case", FAR, ids=lambda case: f"{case.name} {case.target} {case.source}")
def test_rows_far_from_zero_are_normalised(
    case: Case, dropout_p: float, dtype: torch.dtype
) -> None:
    case = dataclasses.replace(case, dropout_p=dropout_p)
    made = case.tensors(dtype)
    low, oracle = case.run(made, "reference"), case.run(widened(made), "reference")
    assert_within_bound(case.run(made, "cpu"), low, oracle)


@pytest.mark.usefixtures("unit")
@units.on_each(units.ALL, torch.float32, torch.bfloat16)
@pytest.mark.parametrize("reduce", [None, "mean"])
@pytest.mark.parametrize("case", FAR, ids=lambda case: f"{case.name} {case.target} {case.source}")
def test_weights_of_rows_far_from_zero(case: Case, reduce: str | None, dtype: torch.dtype) -> None:
    made = case.tensors(dtype)
    actual = case.run_weights(made, "cpu", reduce)
    low = case.run_weights(made, "reference", reduce)
    assert_within_bound(actual, low, case.run_weights(widened(made), "reference", reduce))
    sums = actual["weights"].double().sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.usefixtures("unit")
@units.on_each(units.ALL, torch.float32)
@pytest.mark.parametrize("source", [40, 300])
@pytest.mark.parametrize("magnitude", [1e4, 1e6])
def test_scores_of_few_digits_have_gradients(
    magnitude: float, source: int, dtype: torch.dtype
) -> None:
    # Products are rounded to more than a weight can take, and otherwise forward than backward.
    query, key = (torch.randn(1, 2, length, 64, dtype=dtype) * magnitude for length in (9, source))
    value = torch.randn(1, 2, source, 64, dtype=dtype)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    actual = torch.autograd.grad(attention(*leaves, backend="cpu").sum(), leaves)
    expected = torch.autograd.grad(attention(*leaves, backend="reference").sum(), leaves)
    for got, wanted, unit in zip(actual, expected, (magnitude, magnitude, 1.0), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * unit)


def test_a_step_over_a_long_cache_is_exact() -> None:
    case = Case("step", batch=1, heads=4, key_heads=2, target=1, source=20000, head_dim=64)
    made = {name: tensor.detach() for name, tensor in case.tensors(torch.float32).items()}

    def out(tensors: dict[str, torch.Tensor], backend: str) -> dict[str, torch.Tensor]:
        operands = (tensors[name] for name in ("query", "key", "value"))
        return {"out": attention(*operands, backend=backend)}

    oracle = out({name: tensor.double() for name, tensor in made.items()}, "reference")
    assert_within_bound(out(made, "cpu"), out(made, "reference"), oracle)
