"""``torch.compile(fullgraph=True)`` of modules whose attention is Zeta's."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import zeta
from tests.integrations import torch_attention
from tests.integrations.torch_attention import Case

CASES = [
    Case(shared="all", batch_first=True, weights="mean"),
    Case(attn_mask="bool 2", key_padding_mask="bool", weights="heads"),
    Case(shared="all", is_causal=True, add_bias_kv=True, batched=False),
    Case(sizes=(6, 10), attn_mask="float 3", key_padding_mask="float"),
]


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_the_same_numbers_and_gradients(case: Case) -> None:
    _, ours = torch_attention.modules(case)
    tensors, masks = torch_attention.inputs(case), torch_attention.masks(case)
    expected = torch_attention.run(ours, case, tensors, masks)
    compiled: Any = torch.compile(copy.deepcopy(ours), backend="aot_eager", fullgraph=True)
    found = torch_attention.run(compiled, case, tensors, masks)
    found = {name.removeprefix("_orig_mod."): value for name, value in found.items()}
    torch_attention.assert_same(found, expected)


def encoder_layer(training: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True).train(training)
    zeta.swap(layer)
    return layer


SHAPES = ((2, 5), (3, 6), (4, 9))


def run_layer(
    module: Callable[..., Tensor], grad: bool, batch: int, length: int
) -> tuple[Tensor, ...]:
    # No view of another tensor, to which torch.compile would bind the graph.
    x = torch_attention.wave(torch.empty(batch, length, 16)).float().clone().requires_grad_(grad)
    padding = torch.arange(length) >= torch.arange(1, batch + 1)[:, None]
    out = module(x, src_key_padding_mask=padding)
    return (out, *torch.autograd.grad(out.square().sum(), x)) if grad else (out,)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_an_encoder_layer_compiles_once_for_all_lengths(training: bool) -> None:
    layer = encoder_layer(training)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for batch, length in SHAPES:
        with torch.set_grad_enabled(training):
            found = run_layer(compiled, training, batch, length)
            expected = run_layer(layer, training, batch, length)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
        counts.append(counter.frame_count)
    assert counts == counts[:1] * len(SHAPES)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
def test_with_inductor() -> None:
    layer = encoder_layer(True)
    compiled = torch.compile(layer, fullgraph=True)
    found, expected = run_layer(compiled, True, 2, 5), run_layer(layer, True, 2, 5)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_compiled_before_it_is_swapped() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    x = torch.randn(2, 5, 16)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[0] = True
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter)
    compiled(x, src_key_padding_mask=padding)
    before = counter.frame_count
    zeta.swap(compiled)
    out = compiled(x, src_key_padding_mask=padding)
    torch.testing.assert_close(out, layer(x, src_key_padding_mask=padding))
    assert counter.frame_count > before
