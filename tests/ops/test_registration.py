"""Operators in two layers: gradients above, and none that nobody made."""

from typing import Any

import pytest
import torch
from torch import Tensor

from zeta.ops.registration import operator


@operator("test_doubled")
def doubled(x: Tensor) -> Tensor:
    return x * 2


@operator("test_tripled")
def tripled(x: Tensor) -> Tensor:
    return x * 3


@tripled.register_fake
@doubled.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _gradient(ctx: Any, grad: Tensor) -> Tensor:
    (factor,) = ctx.saved_tensors
    return doubled(grad) / 2 * factor


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(torch.full_like(output, 3.0))


tripled.register_autograd(_gradient, setup_context=_save)


def test_a_gradient_that_is_registered() -> None:
    x = torch.ones(3, requires_grad=True)
    out = tripled(x)
    assert torch.equal(out, torch.full((3,), 3.0))
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.full((3,), 3.0))
    torch.library.opcheck(tripled.overload, (x,))


def test_one_that_is_not_is_refused() -> None:
    """Also a second derivative through an operator that only a gradient uses."""
    x = torch.ones(3, requires_grad=True)
    message = "zeta::test_doubled has no gradient; .* backend='reference'; .* torch.func.hessian"
    with pytest.raises(RuntimeError, match=message):
        doubled(x).sum().backward()
    (grad,) = torch.autograd.grad(
        tripled(x), x, torch.ones(3, requires_grad=True), create_graph=True
    )
    with pytest.raises(RuntimeError, match=message):
        grad.sum().backward()
    with torch.no_grad():
        assert not doubled(x).requires_grad
