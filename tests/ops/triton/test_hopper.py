"""The kernels for Hopper, on one: all that they take, at sizes of several tiles that fill none."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.bound import assert_within_bound
from tests.ops.cases import Case, widened
from zeta import attention, biases, masks

pytestmark = pytest.mark.gpu

SMALL = Case("plain", heads=4, key_heads=2, target=333, source=400)
LARGE = Case("plain", batch=1, heads=2, key_heads=2, target=1090, source=1024)
"""So many scores that an offset bias is written out for the tiles that its band cuts."""
T5 = {"table": (32, 4)}
T5_OF_LARGE = {"table": (32, 2)}


def _t5(made: dict[str, Tensor], *, bidirectional: bool) -> biases.Bias:
    return biases.Bucketed(made["table"], bidirectional=bidirectional)


def _two_ways(made: dict[str, Tensor]) -> biases.Bias:
    return _t5(made, bidirectional=True)


def _one_way(made: dict[str, Tensor]) -> biases.Bias:
    return _t5(made, bidirectional=False)


def _nothing_far(made: dict[str, Tensor]) -> biases.Bias:
    """What lies in the last bucket of each side is hidden."""
    far = torch.zeros(32, 1).index_fill_(0, torch.tensor([15, 31]), float("-inf"))
    return biases.Bucketed(made["table"] + far.to(made["table"].device))


def _padding() -> masks.Mask:
    return masks.Padding(torch.tensor([397, 130]))


CASES = [
    SMALL,
    dataclasses.replace(SMALL, name="even", target=512, source=256, layout="BTHD"),
    dataclasses.replace(SMALL, name="fewer keys, causal", source=150, mask=masks.Causal),
    dataclasses.replace(SMALL, name="window", mask=lambda: masks.SlidingWindow(90)),
    dataclasses.replace(
        SMALL, name="prefix", mask=lambda: masks.PrefixLM(torch.tensor([3, 260])), dropout_p=0.2
    ),
    dataclasses.replace(SMALL, name="padding", mask=_padding, dropout_p=0.1),
    dataclasses.replace(
        SMALL, name="documents",
        mask=lambda: masks.Documents((torch.arange(400) // 70).expand(2, -1)) & masks.Causal(),
    ),
    dataclasses.replace(SMALL, name="t5", learned=T5, bias=_two_ways, dropout_p=0.1),
    dataclasses.replace(
        SMALL, name="t5, causal, padding", learned=T5, bias=_one_way,
        mask=lambda: masks.Causal() & _padding(),
    ),
    dataclasses.replace(
        SMALL, name="t5, window", learned=T5, bias=_one_way, mask=lambda: masks.SlidingWindow(200)
    ),
    dataclasses.replace(SMALL, name="t5, nothing far", learned=T5, bias=_nothing_far),
    LARGE,
    dataclasses.replace(LARGE, name="large, t5", learned=T5_OF_LARGE, bias=_two_ways),
    dataclasses.replace(
        LARGE, name="large, t5, causal, dropout", learned=T5_OF_LARGE, bias=_one_way,
        mask=masks.Causal, dropout_p=0.1,
    ),
]  # fmt: skip


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The passes that the kernels for Hopper have done: others would pass the tests too."""
    from zeta.ops.backends.triton.hopper import passes

    done: list[str] = []

    def noted(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*operands: Any) -> Any:
            done.append(name)
            return run(*operands)

        return noting

    for name in ("forward", "inputs_gradient"):
        monkeypatch.setattr(passes, name, noted(name, getattr(passes, name)))
    return done


@pytest.mark.parametrize("head_dim", [64, 128, 72])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_outputs_and_gradients(case: Case, head_dim: int, served: list[str]) -> None:
    case = dataclasses.replace(case, head_dim=head_dim)
    made = case.tensors(torch.bfloat16, "cuda")
    actual = case.run(made, "triton")
    assert served == ["forward", "inputs_gradient"]
    low = case.run(made, "reference")
    assert_within_bound(actual, low, case.run(widened(made), "reference"))
    for name, again in case.run(made, "triton").items():
        assert torch.equal(again, actual[name]), f"{name} differs between two runs"


def test_float16() -> None:
    case = dataclasses.replace(SMALL, head_dim=64, learned=T5, bias=_two_ways)
    made = case.tensors(torch.float16, "cuda")
    low = case.run(made, "reference")
    assert_within_bound(case.run(made, "triton"), low, case.run(widened(made), "reference"))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_what_lies_in_padding_reaches_nothing(head_dim: int) -> None:
    shape = (2, 4, 300, head_dim)
    query, key, value, dout = (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4)
    )
    mask = masks.Padding(torch.tensor([300, 201], device="cuda"))

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        out = attention(*leaves, mask=mask, backend="triton")
        return out, *torch.autograd.grad(out, leaves, dout)

    expected = run(query, key, value)
    key[1, :, 201:], value[1, :, 201:] = float("nan"), float("inf")
    for found, right in zip(run(query, key, value), expected, strict=True):
        assert torch.equal(found, right)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_more_programs_than_run_at_once_give_the_same_bits(
    head_dim: int, causal: bool, served: list[str]
) -> None:
    query, dout = torch.randn(2, 2, 16, 2048, head_dim, device="cuda", dtype=torch.bfloat16)
    key, value = torch.randn(2, 2, 8, 2048, head_dim, device="cuda", dtype=torch.bfloat16)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]

    def run() -> tuple[Tensor, ...]:
        mask = masks.Causal() if causal else None
        return torch.autograd.grad(attention(*leaves, mask=mask, backend="triton"), leaves, dout)

    expected = run()
    assert "inputs_gradient" in served
    for _ in range(10):
        for found, right in zip(run(), expected, strict=True):
            assert torch.equal(found, right)


def test_a_broadcast_gradient_is_served(served: list[str]) -> None:
    query, key, value = (
        torch.randn(2, 2, 200, 64, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for _ in range(3)
    )
    out = attention(query, key, value, backend="triton")
    found = torch.autograd.grad(out.mean(2).sum(), (query, key, value), retain_graph=True)
    right = torch.autograd.grad(out, (query, key, value), torch.full_like(out, 1 / 200))
    assert served == ["forward", "inputs_gradient", "inputs_gradient"]
    for each, expected in zip(found, right, strict=True):
        torch.testing.assert_close(each, expected)
