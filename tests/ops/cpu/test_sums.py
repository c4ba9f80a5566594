"""Sums that several tasks share are made in one order, whatever the number of threads."""

from collections.abc import Iterator

import pytest
import torch

from tests.ops.cases import T5, Case, assert_within_bound, widened
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
            f"dense {shape}",
            learned={"bias": shape},
            bias=lambda made: biases.Dense(made["bias"]),
            **SIZES,
        )
        for shape in SHAPES
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
BOUNDED = [case for case in CASES if case.name != "dense (1, 4, 1, 1)"]


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


def test_a_step_over_a_long_cache_is_exact() -> None:
    case = Case("step", batch=1, heads=4, key_heads=2, target=1, source=20000, head_dim=64)
    made = {name: tensor.detach() for name, tensor in case.tensors(torch.float32).items()}

    def out(tensors: dict[str, torch.Tensor], backend: str) -> dict[str, torch.Tensor]:
        operands = (tensors[name] for name in ("query", "key", "value"))
        return {"out": attention(*operands, backend=backend)}

    oracle = out({name: tensor.double() for name, tensor in made.items()}, "reference")
    assert_within_bound(out(made, "cpu"), out(made, "reference"), oracle)
