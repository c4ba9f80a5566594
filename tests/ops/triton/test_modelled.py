"""The kernels for Hopper in a model of one, against the reference in float64."""

import dataclasses
import functools
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.bound import assert_within_bound
from tests.ops.cases import Case, widened
from tests.ops.triton.test_hopper import CASES, SMALL
from zeta import attention, masks
from zeta.ops.backends.triton import configs, gradients, hopper

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="other kernels need the interpreter"
    ),
    # Of numpy, in the interpreter.
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

WIDE = [CASES[0], *(c for c in CASES if c.name in ("padding", "large, t5, causal, dropout"))]


class Runner:
    """Launches in the model; `seed` says in what order everything happens there."""

    def __init__(self) -> None:
        from tests.ops.triton.gluon_model.launching import Model

        self.model = Model()
        self.seed = self.num_launches = 0

    def launch(self, kernel: Any, grid: tuple[int, ...], *operands: Any, **constants: Any) -> None:
        self.num_launches += 1
        self.model.launch(kernel, grid, *operands, seed=self.seed, **constants)


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch, poisoned: None) -> Runner:
    from zeta.ops.backends.triton.hopper import passes

    runner = Runner()
    monkeypatch.setattr(hopper, "device_capability", lambda tensor: (9, 0))
    monkeypatch.setattr(passes, "launch", runner.launch)
    # Of the other kernels, which the interpreter takes long for: fewer programs, and large tiles.
    monkeypatch.setattr(gradients, "BAND_PROGRAMS", 1)
    monkeypatch.setattr(configs, "INTERPRETED", configs.Tiles(64, 64, num_warps=4, num_stages=1))
    return runner


def _check(runner: Runner, case: Case) -> None:
    made = case.tensors(torch.float16)
    low, oracle = case.run(made, "reference"), case.run(widened(made), "reference")
    actual = case.run(made, "triton")
    assert runner.num_launches == 2
    assert_within_bound(actual, low, oracle)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_outputs_and_gradients(case: Case, runner: Runner) -> None:
    _check(runner, dataclasses.replace(case, head_dim=64))


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [72, 128])
@pytest.mark.parametrize("case", WIDE, ids=lambda case: case.name)
def test_wide_heads(case: Case, head_dim: int, runner: Runner) -> None:
    _check(runner, dataclasses.replace(case, head_dim=head_dim))


@pytest.mark.slow
@pytest.mark.parametrize("case", [SMALL, CASES[4]], ids=lambda case: case.name)
def test_every_order_of_events_gives_the_same_bits(case: Case, runner: Runner) -> None:
    made = dataclasses.replace(case, head_dim=64).tensors(torch.float16)
    expected = case.run(made, "triton")
    for _ in range(3):
        runner.seed += 1
        for name, found in case.run(made, "triton").items():
            assert torch.equal(found, expected[name]), name


@pytest.mark.slow
def test_what_lies_in_padding_reaches_nothing(runner: Runner) -> None:
    query, key, value, dout = torch.randn(4, 2, 2, 300, 64, dtype=torch.float16)
    mask = masks.Padding(torch.tensor([300, 201]))

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        out = attention(*leaves, mask=mask, backend="triton")
        return out, *torch.autograd.grad(out, leaves, dout)

    expected = run(query, key, value)
    key[1, :, 201:], value[1, :, 201:] = float("nan"), float("inf")
    for found, right in zip(run(query, key, value), expected, strict=True):
        assert torch.equal(found, right)


@pytest.mark.parametrize("seed", range(3))
def test_the_only_tile_of_keys_ends_in_padding(seed: int, runner: Runner) -> None:
    """Its values are cleared while the first products, which mean nothing, may read them."""
    runner.seed = seed
    mask = functools.partial(masks.Padding, torch.tensor([70, 1]))
    _check(
        runner, Case("short", heads=1, key_heads=1, target=65, source=90, head_dim=64, mask=mask)
    )


def test_a_broadcast_gradient_is_served(runner: Runner) -> None:
    query, key, value = torch.randn(3, 1, 2, 100, 64, dtype=torch.float16).unbind()
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    out = attention(*leaves, backend="triton")
    found = torch.autograd.grad(out.mean(2).sum(), leaves, retain_graph=True)
    right = torch.autograd.grad(out, leaves, torch.full_like(out, 1 / 100))
    assert runner.num_launches == 3
    for each, expected in zip(found, right, strict=True):
        torch.testing.assert_close(each, expected)


def test_a_gradient_that_begins_anywhere_is_served(runner: Runner) -> None:
    """The copy engine reads from multiples of 16 bytes."""
    query, key, value = torch.randn(3, 1, 2, 100, 64, dtype=torch.float16).unbind()
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    out = attention(*leaves, backend="triton")
    dout = torch.randn(out.numel() + 1, dtype=out.dtype)[1:].view(out.shape)
    found = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    right = torch.autograd.grad(out, leaves, dout.clone(), retain_graph=True)
    for each, expected in zip(found, right, strict=True):
        assert torch.equal(each, expected)
    # Of one batch entry, the stride means nothing, and may be 0.
    dout = torch.randn(out.shape, dtype=out.dtype).expand(3, *out.shape[1:])[:1]
    found = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    right = torch.autograd.grad(out, leaves, dout.clone(memory_format=torch.contiguous_format))
    for each, expected in zip(found, right, strict=True):
        assert torch.equal(each, expected)
