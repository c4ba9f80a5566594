"""``torch.compile(fullgraph=True)``: one graph for every batch size and length."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from tests.ecosystem.layers import EMBED, HEADS, Layer, padding, tokens
from zeta.caches import StaticCache
from zeta.nn import MultiheadAttention, RotaryEmbedding

SIZES = [(3, 9), (2, 150), (5, 40)]
LAYERS: dict[str, tuple[bool, dict[str, Any]]] = {
    "plain": (False, {}),
    "padding": (True, {"need_weights": False}),
    "causal": (False, {"causal": True}),
    "T5, weights averaged": (False, {"biased": True, "need_weights": "mean", "weights": True}),
    "T5, causal, padding, weights": (True, {"biased": True, "causal": True, "weights": True}),
    "xPos, sub-LN": (False, {"args": {"xpos_rel_pos": True}, "subln": True, "causal": True}),
    "grouped, window": (True, {"num_kv_heads": 2, "window": 3, "qk_norm": "rms"}),
    "multiway": (True, {"args": {"multiway": True}}),
}


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    torch._dynamo.reset()


def outcome(layer: Any, parameters: list[Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """What a layer returns and, in training, the gradients of a loss on all of it."""
    found = layer(*inputs)
    results = [found] if isinstance(found, Tensor) else list(found)
    outputs = [result.detach().clone() for result in results]
    if not torch.is_grad_enabled():
        return outputs
    total = sum(result.square().sum() for result in results)
    assert isinstance(total, Tensor)
    grads = torch.autograd.grad(total, parameters, allow_unused=True)
    return outputs + [
        torch.zeros_like(parameter) if grad is None else grad
        for parameter, grad in zip(parameters, grads, strict=True)
    ]


def compare_sizes(
    layer: Layer,
    padded: bool,
    sizes: list[tuple[int, int]] = SIZES,
    dynamic: bool = True,
    backend: str = "eager",
) -> int:
    """Compares a compiled layer with itself for some sizes; the graphs made after the first one."""
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=dynamic)
    parameters = list(layer.parameters())
    counts = []
    for batch, length in sizes:
        x = tokens(batch, length)
        inputs = (x, padding(batch, length)) if padded else (x,)
        results = []
        for module in (compiled, layer):
            torch.manual_seed(length)  # Of the dropout.
            results.append(outcome(module, parameters, inputs))
        # Gradients are sums over up to 800 tokens.
        torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)
        counts.append(counter.frame_count)
    return counts[-1] - counts[0]


@pytest.mark.parametrize(("padded", "options"), LAYERS.values(), ids=LAYERS)
def test_another_batch_or_length_is_no_other_graph(padded: bool, options: dict[str, Any]) -> None:
    assert compare_sizes(Layer(**options), padded) == 0


@pytest.mark.slow
def test_nor_without_gradients_nor_with_dropout() -> None:
    layer = Layer(dropout=0.3, biased=True, causal=True)
    # Its mask is that of the seed, compiled or not.
    assert compare_sizes(layer, True, backend="aot_eager") == 0
    torch._dynamo.reset()
    with torch.no_grad():
        assert compare_sizes(layer.eval(), True) == 0


def test_the_count_notices_a_graph_for_each_size() -> None:
    with torch.no_grad():
        assert compare_sizes(Layer(), False, dynamic=False) == 2


def decode(attention: Any, x: Tensor, cache: Any) -> Tensor:
    """Four tokens, then one at a time."""
    chunks = [x[:, :4], *x[:, 4:].split(1, dim=1)]
    outs = [
        attention(chunk, chunk, chunk, cache, is_causal=True, need_weights=False)[0]
        for chunk in chunks
    ]
    return torch.cat(outs, 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dict", "static"])
def test_decoding_with_each_cache_settles(kind: str) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"self_attention": True, "position": RotaryEmbedding(EMBED // HEADS)}
    attention = MultiheadAttention(None, EMBED, HEADS, **options).eval()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(attention, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        counts = []
        for batch, length in ((3, 12), (2, 15), (4, 19)):
            x = tokens(batch, length)
            cache: Any = StaticCache(32) if kind == "static" else {}
            expected, _ = attention(x, x, x, is_causal=True)
            torch.testing.assert_close(decode(compiled, x, cache), expected, rtol=0, atol=1e-5)
            counts.append(counter.frame_count)
    # A first chunk, a first step, and steps of any length and batch.
    assert counts[0] <= 4
    assert counts[-1] - counts[1] == 0
