"""Extra keys in dropout, weights, state dicts, narrow dtypes, compiled and transformed calls."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.nn.extra_keys import (
    BOTH,
    EXACT,
    EXTRAS,
    PADDING,
    B,
    E,
    H,
    S,
    T,
    attend,
    check_same,
    make,
    tokens,
)
from zeta import masks
from zeta.bench import peak_bytes
from zeta.nn import MultiheadAttention
from zeta.ops.weights import LazyWeights
from zeta.values import Tile


def values_only() -> MultiheadAttention:
    """What comes out is the weight of the learned key, times ``bias_v``, and nothing else."""
    module = make(dropout=0.25, **EXTRAS["learned"])
    with torch.no_grad():
        for parameter in (*module.v_proj.parameters(), module.out_proj.bias):
            parameter.zero_()
        module.out_proj.weight.copy_(torch.eye(E))
        assert module.bias_v is not None
        module.bias_v.fill_(1.0)
    return module.train()


def test_dropout_drops_an_extra_key_and_scales_it() -> None:
    module = values_only()
    query, source = tokens(400), tokens(S)
    weight_BTH = module(query, source, source)[1][..., -1].permute(1, 2, 0)
    found = module(query, source, source)[0].unflatten(-1, (H, -1))
    kept = found[..., 0] != 0
    torch.testing.assert_close(
        found, torch.where(kept, weight_BTH / 0.75, 0.0)[..., None].expand_as(found), **EXACT
    )
    count = kept.numel()
    # Five standard deviations of a binomial distribution.
    assert abs(kept.sum() - 0.75 * count) < 5 * (count * 0.75 * 0.25) ** 0.5
    # Queries, heads and sequences draw for themselves.
    for dim in range(3):
        assert not torch.equal(kept, kept.roll(1, dim))
    module.eval()
    torch.testing.assert_close(
        module(query, source, source)[0].unflatten(-1, (H, -1))[..., 0], weight_BTH, **EXACT
    )


def test_dropout_has_the_expectation_of_none_and_draws_by_seed() -> None:
    module = make(dropout=0.3, **BOTH)
    query, source = tokens(3), tokens(S)
    expected = module(query, source, source)[0]
    module.train()
    # Every sequence of a batch draws for itself.
    many = [x.repeat(2000, 1, 1) for x in (query, source)]
    draws = module(many[0], many[1], many[1])[0].unflatten(0, (2000, B))
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - expected).abs() < 5 * error).all()
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(module(query, source, source)[0])
    assert torch.equal(*found)


def test_dropout_of_tokens_is_what_it_was() -> None:
    plain, module = make(dropout=0.4, bias=False), make(dropout=0.4, bias=False, **BOTH)
    module.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        assert module.bias_v is not None
        module.bias_v.zero_()
        for part in (plain, module):
            part.out_proj.weight.copy_(torch.eye(E))
    query, source = tokens(T), tokens(S)
    outs = []
    for part in (plain, module):
        torch.manual_seed(5)
        outs.append(part.train()(query, source, source)[0].unflatten(-1, (H, -1)))
    share_BTH = module(query, source, source)[1][..., :S].sum(-1).permute(1, 2, 0)
    torch.testing.assert_close(outs[1], outs[0] * share_BTH[..., None], **EXACT)


def test_weights_are_lazy_and_answer_questions() -> None:
    module = make(**BOTH)
    query, source = tokens(T), tokens(S)
    out, weights = module(query, source, source)
    assert isinstance(weights, LazyWeights)
    assert weights.shape == (H, B, T, S + 2)
    assert not weights.materialized
    expected = attend(module, query, source, source)[1]
    for answer, wanted in (
        (weights.mean(0), expected.mean(0)),
        (weights.rows(2), expected[:, :, 2]),
        (weights.heads([3, 1]), expected[[3, 1]]),
        (weights.topk(3).values, expected.topk(3).values),
        (weights.entropy(), torch.special.entr(expected).sum(-1)),
    ):
        torch.testing.assert_close(answer, wanted, **EXACT)
    assert module(query, source, source, need_weights=False)[1] is None
    assert out.shape == (B, T, E)


def test_weights_are_those_of_the_call() -> None:
    """Also after an optimizer's step."""
    module, x = make(**BOTH), tokens(T)
    before, weights = module(x, x, x, need_weights=True)[1], module(x, x, x)[1]
    with torch.no_grad():
        assert module.bias_k is not None
        module.bias_k.add_(1.0)
        torch.testing.assert_close(weights.clone(), before, **EXACT)


@dataclasses.dataclass(frozen=True, eq=False)
class Odd(masks.Mask):
    """Of a user's own kind, which cannot be cut into heads."""

    def visible(self, tile: Tile) -> Tensor:
        return tile.key_position % 2 == 1


@pytest.mark.parametrize("mask", [None, Odd()], ids=["no mask", "own mask"])
def test_averaged_weights_have_their_gradient(mask: masks.Mask | None) -> None:
    module, x = make(self_attention=True, num_kv_heads=2, **BOTH), tokens(T).requires_grad_()
    visible = None if mask is None else (torch.arange(T) % 2 == 1).expand(T, T)
    leaves = [x, *module.parameters()]
    for lazily in (False, True):
        out, weights = attend(module, x, x, x, visible=visible)
        found, mean = module(x, x, x, attn_mask=mask, need_weights="lazy" if lazily else "mean")
        check_same((found, mean.mean(0) if lazily else mean), (out, weights.mean(0)), leaves)


@pytest.mark.serial
def test_averaged_weights_never_hold_all_heads() -> None:
    many = MultiheadAttention(None, 64, 16, **BOTH)
    x = torch.randn(1, 512, 64)
    with torch.no_grad():
        all_heads = 16 * 512 * 514 * 4
        assert peak_bytes(lambda: many(x, x, x, need_weights="mean"), "cpu") < all_heads / 2
        assert peak_bytes(lambda: many(x, x, x, need_weights=True), "cpu") > all_heads / 2


def test_names_shapes_and_draws() -> None:
    module = MultiheadAttention(None, 64, 4, num_kv_heads=2, **BOTH)
    plain = MultiheadAttention(None, 64, 4, num_kv_heads=2)
    extra = {key: module.state_dict()[key].shape for key in ("bias_k", "bias_v")}
    assert extra == {"bias_k": (1, 1, 32), "bias_v": (1, 1, 32)}
    assert set(module.state_dict()) == {*plain.state_dict(), *extra}
    zeros = MultiheadAttention(None, 64, 4, **EXTRAS["zeros"])
    assert set(zeros.state_dict()) == set(plain.state_dict())
    torch.manual_seed(0)
    wide = MultiheadAttention(None, 4096, 4, device="meta", **BOTH).to_empty(device="cpu")
    wide.reset_parameters()
    for parameter in (wide.bias_k, wide.bias_v):
        assert parameter is not None
        # Xavier normal, of as many inputs as outputs.
        assert abs(parameter.std() * 64 - 1.0) < 0.1
    copied = copy.deepcopy(module)
    x = torch.randn(2, 3, 64)
    assert torch.equal(copied(x, x, x)[0], module(x, x, x)[0])
    assert copied.bias_k is not module.bias_k


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision(dtype: torch.dtype) -> None:
    """Twice the error of the textbook in the same dtype, and one rounding."""
    exact = make(self_attention=True, **BOTH)
    narrow = copy.deepcopy(exact).to(dtype)
    wide = copy.deepcopy(narrow).double()
    x = tokens(32).to(dtype)
    with torch.no_grad():
        expected = attend(wide, x.double(), x.double(), x.double())[0]
        found, usual = narrow(x, x, x)[0], attend(narrow, x, x, x)[0]
    rounding = torch.finfo(dtype).eps * expected.square().mean().sqrt()
    ours, theirs = ((t.double() - expected).square().mean().sqrt() for t in (found, usual))
    assert ours <= 2 * theirs + rounding
    assert found.dtype == dtype


def test_autocast() -> None:
    module = make(self_attention=True, dtype=torch.float32, **BOTH)
    x = tokens(T, dtype=torch.float32)
    expected, weights = module(x, x, x, need_weights=True)
    with torch.autocast("cpu", torch.bfloat16):
        found, seen = module(x, x, x)
        assert found.dtype == seen.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(seen.float(), weights, rtol=0.05, atol=0.05)
    found.float().sum().backward()
    assert module.bias_k is not None
    assert module.bias_k.grad is not None


COMPILED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "learned": (EXTRAS["learned"], {}),
    "zeros, causal": (EXTRAS["zeros"], {"is_causal": True}),
    "both, xPos": ({**BOTH, "args": {"xpos_rel_pos": True}}, {"is_causal": True}),
    "both, grouped, padding": (
        {**BOTH, "num_kv_heads": 2}, {"key_padding_mask": PADDING[:, :T]},
    ),
    "both, weights": ({**BOTH, "need_weights": True}, {"attn_mask": masks.Causal()}),
    "both, mean weights": ({**BOTH, "need_weights": "mean"}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPILED)
def test_one_graph_with_the_same_numbers_and_gradients(name: str) -> None:
    torch._dynamo.reset()
    form, options = COMPILED[name]
    module, x = make(self_attention=True, **form), tokens(T)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    found, expected = compiled(x, x, x, **options), module(x, x, x, **options)
    check_same(found, (expected[0], expected[1].clone()), list(module.parameters()))


def test_dropout_compiles() -> None:
    torch._dynamo.reset()
    module, query, source = values_only(), tokens(T), tokens(S)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    outs = [compiled(query, source, source, need_weights=False)[0] for _ in range(2)]
    assert not torch.equal(*outs)
    assert all((out == 0).any() and (out != 0).any() for out in outs)


def test_function_transforms() -> None:
    module, x = make(**BOTH), tokens(T)
    parameters = dict(module.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        out, weights = torch.func.functional_call(module, parameters, (x, x, x))
        return out.sum() + weights.square().sum()

    found = torch.func.grad(loss)(parameters, x)
    expected = torch.autograd.grad(loss(parameters, x), list(parameters.values()))
    for ours, theirs in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)
