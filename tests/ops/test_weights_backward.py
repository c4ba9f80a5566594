"""Lazy weights after the call: backward passes, what is held, and what may change meanwhile."""

import dataclasses
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.ops.lazy import Counted, Small
from zeta import attention, biases, masks
from zeta.ops.attention import run_weights
from zeta.ops.call import AttentionCall
from zeta.ops.weights import LazyWeights, lazy_weights


def test_only_the_backward_pass_computes_again() -> None:
    small = Small()
    weights = small.lazy()
    loss = (weights * weights).sum() + weights[0].sum()
    assert len(small.compute.calls) == 1
    loss.backward()
    assert len(small.compute.calls) == 2


@pytest.mark.parametrize("retain_graph", [True, False])
def test_loss_on_weights_and_on_the_output(retain_graph: bool) -> None:
    small = Small()
    results = []
    for weights in (small.lazy(heads_first=False), small.plain(heads_first=False)):
        output = attention(
            small.query,
            small.key,
            small.key,
            mask=masks.Causal(),
            bias=biases.Bucketed(small.table, max_distance=16),
            backend="reference",
        )
        loss = output.square().sum() + (weights * weights.detach()).sum()
        rounds = 2 if retain_graph else 1
        for _ in range(rounds):
            loss.backward(retain_graph=retain_graph)
        results.append([leaf.grad for leaf in small.leaves])
        for leaf in small.leaves:
            leaf.grad = None
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("first", [True, False])
def test_loss_on_their_entropy_and_on_all_of_them(first: bool) -> None:
    small = Small()
    results = []
    for weights in (small.lazy(), small.plain()):
        if not first:
            largest = weights.amax()
        entropy = (
            weights.entropy()
            if isinstance(weights, LazyWeights)
            else -(weights * torch.where(weights > 0, weights, 1.0).log()).sum(-1)
        )
        if first:
            largest = weights.amax()
        results.append(torch.autograd.grad(entropy.mean() + largest, small.leaves))
    torch.testing.assert_close(*results)


def test_gradient_of_the_weights_themselves() -> None:
    small = Small()
    weights = small.lazy()
    loss = (weights**2).sum()
    (gradient,) = torch.autograd.grad(loss, weights, retain_graph=True)
    torch.testing.assert_close(gradient, 2 * small.plain())
    weights.retain_grad()
    seen = []
    weights.register_hook(lambda gradient: seen.append(gradient) or gradient * 0)
    loss.backward()
    assert len(seen) == 1
    assert all((leaf.grad == 0).all() for leaf in small.leaves)


def test_a_key_made_from_the_query_counts_once() -> None:
    query = torch.randn(1, 2, 4, 8, dtype=torch.float64, requires_grad=True)

    def weights_of(query: Tensor, compute: Callable[[AttentionCall], Tensor]) -> Tensor:
        scaled = query * 1.0
        call = AttentionCall.checked(scaled, scaled.tanh(), scaled, result="weights")
        return compute(call)

    def lazily(query: Tensor) -> Tensor:
        return weights_of(query, lambda call: lazy_weights(call, Counted()))

    def plainly(query: Tensor) -> Tensor:
        return weights_of(query, lambda call: run_weights(call, "reference"))

    assert torch.autograd.gradcheck(lazily, query)
    assert torch.autograd.gradgradcheck(lazily, query)
    for create_graph in (False, True):
        torch.testing.assert_close(
            *(
                torch.autograd.grad(f(query).square().sum(), query, create_graph=create_graph)
                for f in (lazily, plainly)
            )
        )


def test_some_inputs_without_gradient() -> None:
    for index in range(3):
        small = Small()
        for other in range(3):
            small.leaves[other].requires_grad_(other == index)
        leaf = small.leaves[index]
        weights = small.lazy()
        assert weights.requires_grad
        torch.testing.assert_close(
            torch.autograd.grad(weights.square().sum(), leaf),
            torch.autograd.grad(small.plain().square().sum(), leaf),
        )


def test_unused_weights_are_not_computed_by_a_backward_pass() -> None:
    small = Small()
    weights = small.lazy()
    small.query.sum().backward()
    del weights
    assert small.compute.calls == []


def test_without_gradient_what_was_held_is_let_go() -> None:
    small = Small(requires_grad=False)
    weights = small.lazy()
    query = weakref.ref(small.query)
    compute = small.compute
    del small
    assert query() is not None
    assert weights.sum() > 0
    compute.calls.clear()
    assert query() is None


def test_dropped_weights_leave_no_cycle_behind() -> None:
    gc.collect()
    gc.disable()
    try:
        small = Small()
        weights = small.lazy()
        used = small.lazy()
        (used * 2).sum().backward()
        query = weakref.ref(small.query)
        del small, weights, used
        assert query() is None
    finally:
        gc.enable()


def test_no_grad_and_inference_mode() -> None:
    small = Small()
    with torch.no_grad():
        weights = small.lazy()
    assert not weights.requires_grad
    assert not weights.rows(0).requires_grad
    with torch.inference_mode():
        first = weights + 1
    assert first.is_inference()
    # Read in inference mode, it is still a tensor that autograd can take.
    factor = torch.ones(5, dtype=torch.float64, requires_grad=True)
    (weights.detach() * factor).sum().backward()
    assert factor.grad is not None
    with torch.inference_mode():
        made_there = small.lazy()
        assert torch.equal(made_there, small.plain())
    assert torch.equal(made_there, small.plain())


def test_autocast_does_not_reach_a_call_that_was_made() -> None:
    small = Small(dtype=torch.float32)
    expected = small.plain()
    weights = small.lazy()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        row = weights.rows(1)
        assert torch.equal(weights.detach(), expected)
        loss = weights.float().square().sum()
        got = torch.autograd.grad(loss, small.leaves)
    assert torch.equal(row, expected[..., 1, :])
    torch.testing.assert_close(got, torch.autograd.grad(expected.square().sum(), small.leaves))


@pytest.mark.parametrize("which", ["query", "key"])
def test_a_tensor_changed_in_place_is_an_error(which: str) -> None:
    small = Small()
    weights = small.lazy()
    with torch.no_grad():
        getattr(small, which).mul_(2)
    for read in (Tensor.sum, LazyWeights.entropy, lambda w: w.rows(1)):
        with pytest.raises(
            RuntimeError, match=f"a tensor of the {which} has been changed in place"
        ):
            read(weights)
    assert not weights.materialized


def test_a_mask_changed_in_place_is_an_error() -> None:
    small = Small()
    lengths = torch.tensor([3, 5])
    weights = lazy_weights(
        dataclasses.replace(small.call(), mask=masks.Padding(lengths)), small.compute
    )
    lengths += 1
    with pytest.raises(RuntimeError, match="changed in place since the call"):
        weights.sum()


@pytest.mark.parametrize("name", ["lengths", "bits", "query positions", "key positions"])
def test_looked_at_then_changed_they_have_no_gradient(name: str) -> None:
    small = Small()
    held = {
        "lengths": torch.tensor([3, 5]),
        "bits": torch.rand(4, 5) < 0.5,
        "query positions": torch.arange(4)[None],
        "key positions": torch.arange(5)[None],
    }
    mask = masks.Padding(held["lengths"]) | masks.keep(held["bits"])
    positions = {"query_positions": held["query positions"], "key_positions": held["key positions"]}
    call = dataclasses.replace(small.call(), mask=mask, **positions)
    weights = lazy_weights(call, small.compute)
    loss = weights.square().sum()
    held[name].zero_()
    with pytest.raises(RuntimeError, match="a tensor of the mask or of positions has been changed"):
        loss.backward()


def test_an_optimizers_step_on_a_relative_bias_changes_nothing() -> None:
    small = Small()
    expected = small.plain().detach()
    weights = small.lazy()
    small.query.sum().backward()
    small.table.grad = torch.ones_like(small.table)
    torch.optim.SGD([small.table], lr=1.0).step()
    with torch.no_grad():
        assert torch.equal(weights.rows(1), expected[..., 1, :])
    with pytest.raises(RuntimeError, match=r"look at them under torch.no_grad\(\)"):
        weights.rows(1)
    assert torch.equal(weights.detach(), expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        weights.sum().backward()


@pytest.mark.parametrize("frozen", [False, True])
def test_parameters_may_be_freed_between_the_passes(frozen: bool) -> None:
    """FSDP takes the memory of a layer's parameters, and fills it again for the backward pass, or
    with other numbers after an optimizer's step; torch's count of versions does not see it.
    """
    small = Small()
    small.table = torch.nn.Parameter(small.table.detach(), requires_grad=not frozen)
    leaves = small.leaves[: 2 if frozen else 3]
    expected = small.plain()
    coefficients = torch.randn(expected.shape[:2] + expected.shape[3:], dtype=torch.float64)
    wanted = torch.autograd.grad((expected[..., 1, :] * coefficients).sum(), leaves)
    weights, others, numbers = small.lazy(), small.lazy(), small.table.detach().clone()

    def fill(size: int, numbers: Tensor | None) -> None:
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(small.table):
            small.table.untyped_storage().resize_(size)
            if numbers is not None:
                small.table.copy_(numbers)

    size = small.table.untyped_storage().size()
    fill(0, None)
    row = weights.rows(1)
    torch.testing.assert_close(weights.detach(), expected.detach())
    fill(size, numbers)
    found = torch.autograd.grad((row * coefficients).sum(), leaves)
    torch.testing.assert_close(found, wanted)
    fill(size, numbers + 1)
    torch.testing.assert_close(others.detach(), expected.detach())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    small = Small()

    def block(query: Tensor) -> tuple[Tensor, Tensor]:
        made = dataclasses.replace(small.call(), query=query)
        weights = lazy_weights(made, small.compute)
        return weights.square().sum(), weights

    query = small.query
    loss, weights = checkpoint(block, query, use_reentrant=use_reentrant)
    assert torch.equal(weights, small.plain(heads_first=False))
    loss.backward()
    expected = torch.autograd.grad(small.plain().square().sum(), query)[0]
    torch.testing.assert_close(query.grad, expected)


def test_saved_tensors_may_be_moved() -> None:
    small = Small()
    packed: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: packed.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        weights = small.lazy()
    assert sorted(packed) == sorted(leaf.numel() for leaf in small.leaves)
    weights.sum().backward()


def test_the_backend_that_has_no_second_derivative_says_so() -> None:
    small = Small()
    small.compute = Counted("chunked")
    weights = small.lazy()
    (first,) = torch.autograd.grad(weights.square().sum(), small.query, create_graph=True)
    with pytest.raises(RuntimeError, match="reference"):
        first.sum().backward()
