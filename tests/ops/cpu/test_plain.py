"""The short way to the library: the same bits as the long one.

Shape suffixes: B batch, H query heads, G key heads, T target length, S source length, D head
dimension.
"""

from typing import NoReturn

import pytest
import torch
from torch import Tensor

import zeta
from tests.ops.cpu.plain_calls import (
    KINDS,
    SHAPES,
    Operands,
    Subclass,
    bias_of,
    bits,
    learned,
    operands,
    scores_of,
)
from zeta.masks import Causal, Padding, keep
from zeta.ops import plain
from zeta.ops.backends.cpu import library
from zeta.ops.call import AttentionCall

pytestmark = pytest.mark.skipif(library.obstacle() is not None, reason=str(library.obstacle()))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("kinds", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_it_gives_the_samebits(
    name: str, dtype: torch.dtype, kinds: tuple[str, str], inside: bool
) -> None:
    made = operands(name, dtype, inside)
    mask, bias = scores_of(kinds, made)
    found = plain.attend(*made, mask, bias, 0.3)
    assert found is not None
    expected = zeta.attention(*made, mask=mask, bias=bias, scale=0.3, backend="cpu")
    assert torch.equal(found, expected)
    assert found.dtype == dtype
    assert found.shape == expected.shape
    assert found.transpose(1, 2).is_contiguous() or found.is_contiguous()


def test_the_scale_is_that_of_the_head_dimension() -> None:
    made = operands("blocks")
    found = plain.attend(*made, None, None)
    assert found is not None
    assert torch.equal(found, zeta.attention(*made, backend="cpu"))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_scale_that_is_an_integer_is_plain_too(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = operands("a step")
    expected = [zeta.attention(*made, scale=float(scale), backend="cpu") for scale in (1, 2, -3)]

    def described(*_: object, **__: object) -> NoReturn:
        raise AssertionError("it takes the long way")

    monkeypatch.setattr(AttentionCall, "checked", described)
    run = zeta.attention
    if compiled:
        run = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for scale, wanted in zip((1, 2, -3), expected, strict=True):
        assert torch.equal(run(*made, scale=scale), wanted)


@pytest.mark.parametrize("scale", [2**1024, -(2**1024), True])
def test_a_scale_that_is_no_finite_number_is_refused(scale: int) -> None:
    with pytest.raises((TypeError, ValueError), match="scale must be"):
        zeta.attention(*operands("a step"), scale=scale)


def gradients(out: Tensor, made: Operands, grad_out: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, made, grad_out)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("kinds", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_its_gradients_are_the_samebits(
    name: str, dtype: torch.dtype, kinds: tuple[str, str], inside: bool
) -> None:
    made = operands(name, dtype, inside)
    mask, bias = scores_of(kinds, made)
    for tensor in made:
        tensor.requires_grad_()
    found = plain.attend(*made, mask, bias, 0.3)
    assert found is not None
    expected = zeta.attention(*made, mask=mask, bias=bias, scale=0.3, backend="cpu")
    assert torch.equal(found, expected)
    grad_out = torch.randn_like(found)
    actual = gradients(found, made, grad_out)
    for one, other in zip(actual, gradients(expected, made, grad_out), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "kind",
    ["dense", "dense across", "dense of keys", "table", "table in half", "cap, then table"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_learned_biases_get_the_samebits(name: str, dtype: torch.dtype, kind: str) -> None:
    made = operands(name, dtype)
    bias = bias_of(kind, made)
    (learned,) = bias.flatten()[1]
    assert learned.is_floating_point()
    learned.requires_grad_()
    found = plain.attend(*made, Causal(), bias)  # Nothing else is learned.
    assert found is not None
    expected = zeta.attention(*made, mask=Causal(), bias=bias, backend="cpu")
    grad_out = torch.randn_like(found)
    (actual,) = torch.autograd.grad(found, learned, grad_out)
    (gradient,) = torch.autograd.grad(expected, learned, grad_out)
    assert actual.dtype == learned.dtype
    assert torch.equal(actual, gradient)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kinds", [("none", "none"), ("all of them", "all of them")], ids=str)
@pytest.mark.parametrize("seed", [-5, 2**63 - 1, torch.tensor(1234567890123), None], ids=str)
@pytest.mark.parametrize("name", ["a step", "blocks"])
def test_it_drops_the_same_weights(
    name: str, seed: int | Tensor | None, kinds: tuple[str, str]
) -> None:
    made = operands(name)
    for tensor in made:
        tensor.requires_grad_()
    mask, bias = scores_of(kinds, made)
    found = []
    for backend in ("auto", "cpu"):
        torch.manual_seed(3)
        out = zeta.attention(*made, mask=mask, bias=bias, dropout_p=0.3, seed=seed, backend=backend)
        found.append((out, *gradients(out, made, torch.ones(1).expand(out.shape))))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(found[0][0], zeta.attention(*made, mask=mask, bias=bias))
    if seed is not None:
        assert plain.attend(*made, mask, bias, dropout_p=0.3, seed=seed) is not None


def test_a_gradient_for_one_operand_only() -> None:
    query, key, value = operands("blocks")
    key.requires_grad_()
    for attend in (zeta.attention, lambda *made: zeta.attention(*made, backend="cpu")):
        attend(query, key, value).sum().backward()  # A gradient that is one number everywhere.
    assert key.grad is not None
    (once,) = torch.autograd.grad(zeta.attention(query, key, value).sum(), key)
    torch.testing.assert_close(key.grad, 2 * once)
    assert query.grad is None


def test_a_second_derivative_is_an_error() -> None:
    made = learned()
    out = plain.attend(*made, None, None)
    assert out is not None
    (first,) = torch.autograd.grad(out.sum(), made[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiates once"):
        first.sum().backward()


def test_a_tensor_written_to_before_the_backward_pass_is_noticed() -> None:
    query, key, value = learned()
    written = key * 1
    out = plain.attend(query, written, value, None, None)
    assert out is not None
    written.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("which", ["lengths", "tensor"])
def test_a_mask_written_to_before_the_backward_pass_is_noticed(which: str) -> None:
    made = learned("blocks")
    mask = Padding(torch.tensor([100, 200])) if which == "lengths" else keep(bits(2, 1, 1, 300))
    out = plain.attend(*made, mask, None)
    assert out is not None
    getattr(mask, which).zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("kinds", [("none", "none"), ("all of them", "all of them")], ids=str)
def test_saved_tensors_may_come_back_otherwise(kinds: tuple[str, str]) -> None:
    """Of other strides, negated on paper, or of a class of their own."""
    made = learned("blocks")
    mask, bias = scores_of(kinds, made)
    out = zeta.attention(*made, mask=mask, bias=bias, scale=0.3)
    expected = gradients(out, made, torch.ones(1).expand(made[0].shape))

    def spread(saved: Tensor) -> Tensor:
        return saved.mT.contiguous().mT if saved.dim() > 1 else saved

    def wrapped(saved: Tensor) -> Tensor:
        return saved.as_subclass(Subclass)

    def negated(saved: Tensor) -> Tensor:
        return torch._neg_view(-saved) if saved.is_floating_point() else saved

    for change in (spread, negated, wrapped):
        with torch.autograd.graph.saved_tensors_hooks(change, lambda saved: saved):
            out = plain.attend(*made, mask, bias, 0.3)
        assert out is not None
        actual = gradients(out, made, torch.ones(1).expand(made[0].shape))
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_without_gradients_nothing_is_recorded() -> None:
    made = learned()
    with torch.no_grad():
        out = plain.attend(*made, None, None)
    assert out is not None
    assert not out.requires_grad
    recorded = plain.attend(*made, None, None)
    assert recorded is not None
    assert recorded.requires_grad
    assert torch.equal(out, recorded)
