"""Zeta's drop-in for ``torch.nn.MultiheadAttention`` against torch's own, in float64."""

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from tests.integrations import torch_attention
from tests.integrations.torch_attention import BATCH, EMBED, HEADS, SOURCE, TARGET, Case
from zeta import LazyWeights
from zeta.integrations.pytorch import MultiheadAttention

PAIRS = torch_attention.pairs()


@pytest.mark.parametrize("cases", [pytest.param(c, id=str(p)) for p, c in PAIRS.items() if c])
def test_every_two_options_give_what_torch_gives(cases: list[Case]) -> None:
    for case in cases:
        theirs, ours = torch_attention.modules(case)
        tensors, masks = torch_attention.inputs(case), torch_attention.masks(case)
        expected = torch_attention.run(theirs, case, tensors, masks)
        found = torch_attention.run(ours, case, tensors, masks)
        torch_attention.assert_same(found, expected)


def test_all_options_together() -> None:
    case = Case(
        add_bias_kv=True, add_zero_attn=True, sizes=(6, 10), attn_mask="float 3",
        key_padding_mask="bool", weights="heads",
    )  # fmt: skip
    theirs, ours = torch_attention.modules(case)
    tensors, masks = torch_attention.inputs(case), torch_attention.masks(case)
    found = torch_attention.run(ours, case, tensors, masks)
    torch_attention.assert_same(found, torch_attention.run(theirs, case, tensors, masks))


def test_the_comparison_sees_a_difference() -> None:
    case = Case(weights="mean")
    theirs, ours = torch_attention.modules(case)
    tensors = torch_attention.inputs(case)
    expected = torch_attention.run(theirs, case, tensors, {})
    for name in expected:
        wrong = dict(expected)
        wrong[name] = expected[name].detach().clone()
        wrong[name].view(-1)[-1] += 1e-6
        with pytest.raises(AssertionError, match=name.replace(".", r"\.")):
            torch_attention.assert_same(wrong, expected)
    with torch.no_grad():
        ours.out_proj.bias[0] += 1e-6
    with pytest.raises(AssertionError, match="out"):
        torch_attention.assert_same(torch_attention.run(ours, case, tensors, {}), expected)


def test_the_signatures_are_torchs() -> None:
    for name in ("__init__", "forward"):
        theirs = inspect.signature(getattr(nn.MultiheadAttention, name)).parameters.values()
        ours = inspect.signature(getattr(MultiheadAttention, name)).parameters.values()
        pairs = [(p.name, p.default) for p in ours if p.kind is not p.KEYWORD_ONLY]
        assert pairs == [(p.name, p.default) for p in theirs]


@pytest.mark.parametrize("case", torch_attention.cases("add_bias_kv", "sizes"))
def test_the_attributes_are_torchs(case: Case) -> None:
    theirs, ours = torch_attention.modules(case, dropout=0.25)
    assert isinstance(ours, nn.MultiheadAttention)
    private = {"weights", "_forward_pre_hooks"}
    assert vars(ours).keys() - private == vars(theirs).keys() - private
    for name, value in vars(theirs).items():
        if not name.startswith("_") or name == "_qkv_same_embed_dim":
            assert getattr(ours, name) == value
    for name in ("in_proj_weight", "q_proj_weight", "in_proj_bias", "bias_k", "bias_v"):
        assert type(getattr(ours, name)) is type(getattr(theirs, name))


def test_new_parameters_are_drawn_as_torchs() -> None:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(EMBED, HEADS, add_bias_kv=True)
    torch.manual_seed(0)
    ours = MultiheadAttention(EMBED, HEADS, add_bias_kv=True)
    for name, parameter in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], parameter)


@pytest.mark.parametrize("case", torch_attention.cases("add_bias_kv", "sizes"))
def test_state_dicts_go_both_ways(case: Case) -> None:
    theirs, ours = torch_attention.modules(case)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    tensors = torch_attention.inputs(case)
    torch.testing.assert_close(ours(*tensors)[0], theirs(*tensors)[0])


def test_copies_and_pickles_compute_the_same() -> None:
    case = Case(add_bias_kv=True)
    _, ours = torch_attention.modules(case, weights="torch")
    tensors = torch_attention.inputs(case)
    saved = io.BytesIO()
    torch.save(ours, saved)
    saved.seek(0)
    for other in (
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(saved, weights_only=False),
    ):
        assert type(other) is MultiheadAttention
        assert other.weights == "torch"
        assert other.in_proj_weight is not ours.in_proj_weight
        assert len(other._forward_pre_hooks) == 1
        torch.testing.assert_close(other(*tensors)[0], ours(*tensors)[0])


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("batched", [True, False])
def test_weights_are_computed_when_they_are_looked_at(average: bool, batched: bool) -> None:
    case = Case(batched=batched)
    _, ours = torch_attention.modules(case)
    _, weights = ours(*torch_attention.inputs(case), average_attn_weights=average)
    assert isinstance(weights, LazyWeights)
    assert not weights.materialized
    heads = () if average else (HEADS,)
    assert weights.shape == ((BATCH,) if batched else ()) + heads + (TARGET, SOURCE)
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]).double())
    assert weights.materialized


@pytest.mark.parametrize("batch_first", [True, False])
def test_the_output_is_contiguous(batch_first: bool) -> None:
    _, ours = torch_attention.modules(Case(batch_first=batch_first))
    tensors = torch_attention.inputs(Case(batch_first=batch_first))
    assert ours(*tensors)[0].is_contiguous()


def test_one_tensor_is_projected_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    linear = torch.nn.functional.linear

    def counted(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        return linear(*arguments)

    _, ours = torch_attention.modules(Case())
    x, y, z = torch_attention.inputs(Case())
    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    for tensors, expected in (((x, x, x), 1), ((x, y, y), 2), ((x, y, z), 3)):
        calls.clear()
        ours(*tensors)
        assert len(calls) == expected + 1  # and the output


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    case = Case(add_bias_kv=True, key_padding_mask="bool")
    theirs, ours = (module.float() for module in torch_attention.modules(case))
    tensors = [tensor.detach().float() for tensor in torch_attention.inputs(case)]
    masks = torch_attention.masks(case)
    exact = theirs(*tensors, **masks)[0]
    with torch.autocast("cpu", dtype=dtype):
        found, expected = ours(*tensors, **masks)[0], theirs(*tensors, **masks)[0]
    assert found.dtype == expected.dtype == dtype
    error, bound = (found - exact).abs().max(), (expected - exact).abs().max()
    assert error <= 2 * bound + torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    case = Case(attn_mask="float 2")
    theirs, ours = torch_attention.modules(case)
    tensors, masks = torch_attention.inputs(case), torch_attention.masks(case)
    exact = theirs(*tensors, **masks)[0]
    low = [tensor.detach().to(dtype) for tensor in tensors]
    masks = {name: mask.detach().to(dtype) for name, mask in masks.items()}
    found, expected = ours.to(dtype)(*low, **masks)[0], theirs.to(dtype)(*low, **masks)[0]
    assert found.dtype == dtype
    error, bound = (found - exact).abs().max(), (expected - exact).abs().max()
    assert error <= 2 * bound + torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("case", [Case(), Case(add_bias_kv=True, add_zero_attn=True)], ids=str)
@pytest.mark.parametrize("sizes", [(0, 5, 7), (3, 0, 7)], ids=["no sequences", "no queries"])
def test_nothing_gives_nothing(case: Case, sizes: tuple[int, int, int]) -> None:
    batch, target, source = sizes
    theirs, ours = torch_attention.modules(case)
    query = torch.randn(target, batch, EMBED, dtype=torch.float64)
    key = torch.randn(source, batch, EMBED, dtype=torch.float64)
    for average in (True, False):
        found = ours(query, key, key, average_attn_weights=average)
        expected = theirs(query, key, key, average_attn_weights=average)
        for one, other in zip(found, expected, strict=True):
            assert one.shape == other.shape
    found[0].sum().backward()
    assert not ours.in_proj_weight.grad.any()


def test_without_keys_there_is_nothing_to_see() -> None:
    _, ours = torch_attention.modules(Case())
    query = torch.randn(TARGET, BATCH, EMBED, dtype=torch.float64)
    out, weights = ours(query, query[:0], query[:0])
    torch.testing.assert_close(out, ours.out_proj.bias.expand(TARGET, BATCH, EMBED))
    assert weights.shape == (BATCH, TARGET, 0)
    assert ours(query[:, 0], query[:0, 0], query[:0, 0])[1].shape == (TARGET, 0)


def test_the_output_projection_is_a_module_of_its_own() -> None:
    # As an adapter or a quantiser wants it; torch reads its weight past it.
    _, ours = torch_attention.modules(Case())
    seen: list[torch.Size] = []
    ours.out_proj.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    ours(*torch_attention.inputs(Case()))
    assert seen == [(TARGET, BATCH, EMBED)]
