"""``torch.compile``: the first thing a fresh process does, whole graphs, and few of them."""

import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from zeta.nn import (
    ALiBi,
    MultiheadAttention,
    RelativePositionBias,
    RotaryEmbedding,
    set_split_position,
)

B, H, T, E = 2, 4, 7, 16


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_first_call_of_a_fresh_process(training: bool) -> None:
    """With inductor, forward and, in training, backward; the same numbers as without."""
    code = f"""
    import torch
    from zeta.nn import MultiheadAttention, RelativePositionBias

    torch.manual_seed(0)
    rel_pos = RelativePositionBias(False, n_heads=4)
    options = dict(self_attention=True, subln=True, need_weights=False)
    module = MultiheadAttention({{"xpos_rel_pos": True}}, 16, 4, **options).train({training})
    x = torch.randn(2, 7, 16, requires_grad=True)
    compiled = torch.compile(module, fullgraph=True)
    out, _ = compiled(x, x, x, rel_pos=rel_pos, is_causal=True)
    expected, _ = module(x, x, x, rel_pos=rel_pos, is_causal=True)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    if {training}:
        leaves = [x, *module.parameters(), *rel_pos.parameters()]
        found = torch.autograd.grad(out.square().sum(), leaves)
        wanted = torch.autograd.grad(expected.square().sum(), leaves)
        for ours, theirs in zip(found, wanted):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    print("done")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.stdout == "done\n", done.stderr


def make(args: Any = None, **options: Any) -> MultiheadAttention:
    return MultiheadAttention(args, E, H, self_attention=True, **options)


def hide_some() -> Tensor:
    mask = torch.zeros(B, T, dtype=torch.bool)
    mask[0, 5:] = True
    return mask


CASES: dict[str, Callable[[], tuple[MultiheadAttention, dict[str, Any]]]] = {
    "plain": lambda: (make(), {}),
    "causal": lambda: (make(), {"is_causal": True}),
    "grouped heads": lambda: (make(num_kv_heads=2), {"is_causal": True}),
    "xPos and sub-LN": lambda: (make({"xpos_rel_pos": True}, subln=True), {"is_causal": True}),
    "rotary, norms, window": lambda: (
        make(position=RotaryEmbedding(4), qk_norm="rms", window=3),
        {"positions": torch.arange(T).flip(0)},
    ),
    "padding": lambda: (make(), {"key_padding_mask": hide_some(), "is_causal": True}),
    "float mask": lambda: (make(), {"attn_mask": torch.randn(T, T, requires_grad=True)}),
    "T5": lambda: (make(), {"rel_pos": RelativePositionBias(n_heads=H), "is_causal": True}),
    "ALiBi": lambda: (make(), {"rel_pos": ALiBi(H), "key_padding_mask": hide_some()}),
    "weights": lambda: (make(need_weights=True), {}),
    "mean weights": lambda: (make(need_weights="mean"), {"is_causal": True}),
    "multiway": lambda: (make({"multiway": 3}), {"split_position": torch.ones(B, T).long()}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("training", [True, False])
def test_whole_graph_with_the_same_numbers_and_gradients(name: str, training: bool) -> None:
    module, options = CASES[name]()
    module.train(training)
    x = torch.randn(B, T, E)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(training):
        found, expected = compiled(x, x, x, **options), module(x, x, x, **options)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, torch.as_tensor(theirs), rtol=1e-4, atol=1e-5)
    if training:
        parameters = list(module.parameters())
        gradients = [
            torch.autograd.grad(result[0].square().sum(), parameters)
            for result in (found, expected)
        ]
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_dropout_compiles_and_drops() -> None:
    module, x = make(dropout=0.5), torch.randn(B, T, E)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    first, second = (compiled(x, x, x, need_weights=False)[0] for _ in range(2))
    assert not torch.allclose(first, second)
    first.sum().backward()


def test_weights_that_nobody_uses_are_not_computed() -> None:
    module, x = make(), torch.randn(B, T, E)
    sizes: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graph.graph.eliminate_dead_code()
        for node in graph.graph.nodes:
            value = node.meta.get("example_value")
            if isinstance(value, Tensor) and value.dim() == 4:
                sizes.append(value.shape[-1])
        return graph.forward

    def output_only(x: Tensor) -> Tensor:
        return module(x, x, x)[0]

    torch.compile(output_only, fullgraph=True, backend=backend)(x)
    assert sizes
    assert T not in sizes


def graphs_of(module: MultiheadAttention) -> tuple[Any, CompileCounter]:
    counter = CompileCounter()
    return torch.compile(module, fullgraph=True, backend=counter), counter


def test_setting_another_split_makes_no_other_graph() -> None:
    module, x = make({"multiway": True}, subln=True), torch.randn(B, T, E)
    compiled, counter = graphs_of(module)
    for split in (-1, 0, 3, 1, T, T + 4):
        module.apply(set_split_position(split))
        torch.testing.assert_close(compiled(x, x, x)[0], module(x, x, x)[0], rtol=0, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("form", ["0-d", "one a sequence", "one a token"])
def test_another_split_tensor_makes_no_other_graph(form: str) -> None:
    module, x = make({"multiway": True}), torch.randn(B, T, E)
    compiled, counter = graphs_of(module)
    for split in (-1, 0, 3, 1, T):
        ways = torch.arange(T) >= (T if split == -1 else split)
        splits = {
            "0-d": torch.tensor(split),
            "one a sequence": torch.tensor([split] * B),
            "one a token": ways.long().repeat(B, 1),
        }
        found = compiled(x, x, x, split_position=splits[form])[0]
        expected = module(x, x, x, split_position=split)[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert counter.frame_count == 1


def test_split_numbers_make_one_graph_more_and_no_further() -> None:
    """torch compiles the first int in, and makes it variable when another one comes."""
    module, x = make({"multiway": True}), torch.randn(B, T, E)
    compiled, counter = graphs_of(module)
    for split in (3, 5, 2, 0, -1, 1, T, 4):
        found = compiled(x, x, x, split_position=split)[0]
        expected = module(x, x, x, split_position=split)[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert counter.frame_count == 2


def test_decoding_from_a_dict_settles_on_one_graph() -> None:
    module, x = make({"xpos_rel_pos": True}).eval(), torch.randn(B, 12, E)
    expected, _ = module(x, x, x, is_causal=True)
    compiled, counter = graphs_of(module)
    state: dict[str, Any] = {}
    outs = []
    counts = []
    with torch.no_grad():
        for t in range(12):
            token = x[:, t : t + 1]
            outs.append(compiled(token, token, token, state, need_weights=False)[0])
            counts.append(counter.frame_count)
    torch.testing.assert_close(torch.cat(outs, 1), expected, rtol=0, atol=1e-5)
    assert counts[-1] == counts[3] <= 4


def test_export() -> None:
    module, x = make({"xpos_rel_pos": True}, need_weights=False).eval(), torch.randn(B, T, E)
    exported = torch.export.export(module, (x, x, x), {"is_causal": True})
    torch.testing.assert_close(
        exported.module()(x, x, x, is_causal=True)[0], module(x, x, x, is_causal=True)[0]
    )
