"""The reference in half precision: float32 on the same numbers, and each result rounded once.

Every other backend is held to it there.
"""

import pytest
import torch
from torch import Tensor

from tests.ops.cases import CASES, Case, Made
from zeta import attention_weights, attention_with_lse

HALVES = (torch.bfloat16, torch.float16)


def in_float32(made: Made) -> Made:
    return {name: leaf.detach().float().requires_grad_() for name, leaf in made.items()}


def results(case: Case, made: Made, incoming: dict[str, Tensor]) -> dict[str, Tensor]:
    """Output, log-sum-exp and gradients, for these gradients of both."""
    operands = (made["query"], made["key"], made["value"])
    out, lse = attention_with_lse(*operands, backend="reference", **case.arguments(made))  # type: ignore[arg-type]
    found = torch.autograd.grad(
        (out, lse), list(made.values()), (incoming["out"].to(out.dtype), incoming["lse"])
    )
    return {"out": out, "lse": lse} | dict(zip(made, found, strict=True))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_outputs_and_gradients_are_rounded_once(case: Case, dtype: torch.dtype) -> None:
    made = case.tensors(dtype)
    shape = (case.batch, case.heads, case.target, case.value_dim or case.head_dim)
    incoming = {"out": torch.randn(shape).to(dtype), "lse": torch.randn(shape[:3])}
    wide = results(case, in_float32(made), incoming)
    for name, tensor in results(case, made, incoming).items():
        expected = wide[name] if name == "lse" else wide[name].to(dtype)
        assert tensor.dtype == expected.dtype, name
        assert torch.equal(tensor, expected), name


@pytest.mark.parametrize("reduce", [None, "mean"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_weights_are_rounded_once(case: Case, dtype: torch.dtype, reduce: str | None) -> None:
    made = case.tensors(dtype)

    def weights(made: Made) -> Tensor:
        given = case.arguments(made)
        del given["dropout_p"], given["seed"]
        return attention_weights(
            made["query"],
            made["key"],
            reduce=reduce,
            backend="reference",
            **given,  # type: ignore[arg-type]
        )

    assert torch.equal(weights(made), weights(in_float32(made)).to(dtype))
