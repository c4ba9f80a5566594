"""Every kind of module, converted."""

import copy
import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zeta
from tests.convert.sources import MODULES, converted, kind_of, make
from tests.convert.textbooks import FairseqAttention
from zeta import convert
from zeta.nn import MultiheadAttention, RelativePositionBias


@pytest.mark.parametrize("name", MODULES)
def test_conversion_is_exact_and_the_original_stays_as_it_is(name: str) -> None:
    module = make(name)
    before, text = copy.deepcopy(module.state_dict()), repr(module)
    implementation = implementation_of(module)
    generator = torch.get_rng_state()
    attention, bias = converted(module)
    report = convert.check(module, attention, rel_pos=bias)
    assert torch.equal(torch.get_rng_state(), generator)
    assert_exact(report, attention, bias)
    assert_same_state(module, before)
    assert repr(module) == text
    assert module.training
    assert all(parameter.grad is None for parameter in module.parameters())
    assert implementation_of(module) == implementation
    # Nothing is shared: training one does not move the other.
    own = {tensor.data_ptr() for tensor in module.state_dict().values()}
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.fill_(7.0)
    assert_same_state(module, before)
    assert own.isdisjoint(parameter.data_ptr() for parameter in attention.parameters())


def implementation_of(module: nn.Module) -> str | None:
    """Which attention function Transformers gives the module."""
    return getattr(getattr(module, "config", None), "_attn_implementation", None)


def assert_same_state(module: nn.Module, before: dict[str, Tensor]) -> None:
    after = module.state_dict()
    assert list(after) == list(before)
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor)


def assert_exact(
    report: convert.Report, attention: MultiheadAttention, bias: RelativePositionBias | None
) -> None:
    assert report.passed, str(report)
    assert report.changed == ()
    assert report.compared == len(attention.state_dict()) + (bias is not None)
    # Not an empty proof: outputs and both gradients in every call.
    assert len(report.cases) >= 4
    for case in report.cases:
        if not case.name.startswith("decoding"):
            assert case.inputs is not None
            assert case.parameters is not None


@pytest.mark.parametrize("name", ["torchscale", "t5", "bart", "bert", "vit", "llama", "mistral"])
def test_a_factor_of_the_scores_that_was_changed_is_converted(name: str) -> None:
    module: Any = make(name)
    (module.self if name == "bert" else module).scaling = 0.7
    attention, bias = converted(module)
    assert attention.scale == 0.7
    report = convert.check(module, attention, rel_pos=bias)
    assert report.passed, str(report)
    with pytest.raises(convert.ConversionError, match=r"cannot express scale=0\.7"):
        convert.to_module(attention, name)


@pytest.mark.parametrize("name", [name for name in MODULES if kind_of(name) != "zetascale"])
def test_there_and_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # fairseq cannot be installed: its textbook takes its place.
    textbook = SimpleNamespace(MultiheadAttention=FairseqAttention)
    monkeypatch.setitem(sys.modules, "fairseq.modules.multihead_attention", textbook)
    kind = kind_of(name)
    attention, _ = converted(make(name))
    with torch.no_grad():
        # A scale of its own, as only GPT-2 can have, does not come from a configuration alone.
        attention.scale = {"t5": 1.0}.get(kind, 1.0 / math.sqrt(attention.head_dim))
    module = convert.to_module(attention, kind)
    report = convert.check(module, attention)
    assert report.passed, str(report)
    again = convert.from_module(module)
    for key, tensor in attention.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("torch", "bart"), ("bart", "gpt2"), ("gpt2", "torch"), ("bert", "vit"), ("vit", "torch"),
     ("fairseq", "torch"), ("torch", "torchscale"), ("zetascale", "torchscale"),
     ("mistral, no window", "llama"), ("llama", "mistral")],
)  # fmt: skip
def test_to_another_kind(name: str, kind: str) -> None:
    attention, _ = converted(make(name))
    report = convert.check(convert.to_module(attention, kind), attention)
    assert report.passed, str(report)


def test_outputs_by_hand() -> None:
    """One comparison without `check`, in float32, as a user would make it."""
    module = nn.MultiheadAttention(16, 4)
    attention = convert.from_module(module)
    x = torch.randn(2, 9, 16)
    hidden = torch.ones(9, 9, dtype=torch.bool).triu(1)
    expected, expected_weights = module(*[x.transpose(0, 1)] * 3, attn_mask=hidden)
    found, weights = attention(x, x, x, is_causal=True, need_weights="mean")
    torch.testing.assert_close(found, expected.transpose(0, 1))
    torch.testing.assert_close(weights, expected_weights)


def test_flags_dtypes_and_mode_are_carried_over() -> None:
    module = nn.MultiheadAttention(16, 4, dropout=0.25).bfloat16().eval()
    module.in_proj_bias.requires_grad_(False)
    attention = convert.from_module(module)
    assert attention.dropout == 0.25
    assert not attention.training
    assert all(parameter.dtype == torch.bfloat16 for parameter in attention.parameters())
    frozen = {name for name, part in attention.named_parameters() if not part.requires_grad}
    assert frozen == {"q_proj.bias", "k_proj.bias", "v_proj.bias"}
    assert convert.check(module, attention).passed
    back = convert.to_module(attention, "torch")
    assert not back.training
    assert {name for name, part in back.named_parameters() if not part.requires_grad} == {
        "in_proj_bias"
    }
    assert all(parameter.dtype == torch.bfloat16 for parameter in back.parameters())


def test_flags_of_a_projection_under_two_names_are_carried_over() -> None:
    module: Any = make("bart")
    module.v_proj = module.k_proj
    module.k_proj.requires_grad_(False)
    attention = convert.from_module(module)
    frozen = {name for name, part in attention.named_parameters() if not part.requires_grad}
    assert frozen == {"k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"}
    attention.v_proj = attention.k_proj
    back = convert.to_module(attention, "bart")
    frozen = {name for name, part in back.named_parameters() if not part.requires_grad}
    assert frozen == {"k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"}


def test_zetas_drop_in_for_torchs_is_converted() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    zeta.swap(layer)
    attention = convert.from_module(layer.self_attn)
    report = convert.check(layer.self_attn, attention)
    assert report.passed, str(report)


def test_modules_on_the_meta_device_are_converted() -> None:
    attention = convert.from_module(nn.MultiheadAttention(16, 4, device="meta"))
    assert all(parameter.is_meta for parameter in attention.parameters())


def test_the_split_of_multiway_is_carried_over() -> None:
    module = make("torchscale, multiway").eval()
    for part in module.modules():
        if hasattr(part, "split_position"):
            part.split_position = 4
    attention = convert.from_module(module)
    x = torch.randn(2, 9, 16)
    torch.testing.assert_close(attention(x, x, x)[0], module(x, x, x)[0], rtol=1e-4, atol=1e-4)
    assert convert.to_module(attention, "torchscale").q_proj.split_position == 4


def test_what_a_module_does_not_tell_can_be_told() -> None:
    attention = convert.from_module(make("bart"), encoder_decoder_attention=True)
    assert attention.encoder_decoder_attention
    assert not convert.from_module(make("bart")).encoder_decoder_attention
    assert not convert.from_module(
        make("bert, cross"), encoder_decoder_attention=False
    ).encoder_decoder_attention


def test_biases_that_some_projections_have() -> None:
    module = make("bart")
    module.k_proj.bias = None
    attention = convert.from_module(module)
    assert attention.k_proj.bias is None
    assert convert.check(module, attention).passed


def test_a_converted_module_trains_and_is_reset() -> None:
    attention = convert.from_module(make("vit, no bias"))
    assert attention.q_proj.bias is None
    assert attention.out_proj.bias is not None
    x = torch.randn(2, 5, 16)
    attention(x, x, x)[0].sum().backward()
    attention.reset_parameters()
    assert not attention.out_proj.bias.any()
