"""The module under ``torch.compile``: dropout, and few graphs for splits and steps."""

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from zeta.nn import MultiheadAttention, set_split_position

B, H, T, E = 2, 4, 7, 16


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def make(args: Any = None, **options: Any) -> MultiheadAttention:
    return MultiheadAttention(args, E, H, self_attention=True, **options)


def test_dropout_compiles_and_drops() -> None:
    module, x = make(dropout=0.5), torch.randn(B, T, E)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    first, second = (compiled(x, x, x, need_weights=False)[0] for _ in range(2))
    assert not torch.allclose(first, second)
    first.sum().backward()


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


@pytest.mark.parametrize(("xpos", "most"), [(False, 3), (True, 4)])
def test_decoding_from_a_dict_settles_on_one_graph(xpos: bool, most: int) -> None:
    module, x = make({"xpos_rel_pos": xpos}).eval(), torch.randn(B, 12, E)
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
    assert counts[-1] == counts[3] <= most


def test_export() -> None:
    module, x = make({"xpos_rel_pos": True}, need_weights=False).eval(), torch.randn(B, T, E)
    exported = torch.export.export(module, (x, x, x), {"is_causal": True})
    torch.testing.assert_close(
        exported.module()(x, x, x, is_causal=True)[0], module(x, x, x, is_causal=True)[0]
    )
