"""Every kind of module, converted and compared; and comparisons that must fail."""

import copy
import dataclasses
import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zeta
from tests.convert.sources import MODULES, kind_of, make
from tests.convert.textbooks import FairseqAttention
from zeta import convert
from zeta.convert import checking
from zeta.nn import MultiheadAttention, RelativePositionBias, RotaryEmbedding


def converted(module: nn.Module) -> tuple[MultiheadAttention, RelativePositionBias | None]:
    has_bias = getattr(module, "has_relative_attention_bias", False)
    bias = convert.relative_position_bias(module) if has_bias else None
    return convert.from_module(module), bias


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


def perturb(attention: nn.Module, name: str, by: float = 1e-3) -> None:
    with torch.no_grad():
        tensor = attention.state_dict()[name]
        tensor.view(-1)[-1] += by * (1.0 + tensor.view(-1)[-1].abs())


EVERY_KIND = list({kind_of(name): name for name in reversed(MODULES)}.values())


@pytest.fixture
def few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each proof the first call and the last, which splits multiway modules."""
    every = checking.calls
    monkeypatch.setattr(checking, "calls", lambda *given: [list(every(*given))[i] for i in (0, -1)])


@pytest.mark.parametrize("name", EVERY_KIND)
@pytest.mark.usefixtures("few_calls")
def test_a_perturbed_weight_fails(name: str) -> None:
    module = make(name)
    for key in converted(module)[0].state_dict():
        attention, bias = converted(module)
        perturb(attention, key)
        report = convert.check(module, attention, rel_pos=bias)
        assert not report.passed
        assert report.changed == (key,)
        words = rf"(?s)not exact.*DIFFERENT.*{key} differs"
        with pytest.raises(convert.ConversionError, match=words):
            report.require()


@pytest.mark.parametrize("name", EVERY_KIND)
@pytest.mark.usefixtures("few_calls")
def test_the_numbers_alone_show_a_perturbed_weight(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checking, "_differences", lambda *_: ([], 1))
    module = make(name)
    attention, bias = converted(module)
    assert convert.check(module, attention, rel_pos=bias).passed
    for key in attention.state_dict():
        # A key's bias moves all scores of a query alike, which no softmax notices; the buffer of
        # xPos is never read.
        if ("k_proj" in key and "bias" in key and "llama" not in name) or key == "xpos.scale":
            continue
        attention, bias = converted(module)
        perturb(attention, key)
        report = convert.check(module, attention, rel_pos=bias)
        assert not all(case.within(report.tolerance) for case in report.cases), key


def test_a_perturbed_position_bias_fails() -> None:
    module = make("t5, encoder bias")
    attention, bias = converted(module)
    assert bias is not None
    perturb(bias, "relative_attention_bias.weight", 1e-2)
    report = convert.check(module, attention, rel_pos=bias)
    assert not report.passed
    assert report.changed == ("rel_pos.relative_attention_bias.weight",)


def changed(attention: MultiheadAttention, **fields: Any) -> MultiheadAttention:
    for name, value in fields.items():
        setattr(attention, name, value)
    return attention


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("torch", {"scale": 0.51}),
        ("t5", {"scale": 5**-0.5}),
        ("torch", {"num_heads": 2, "num_kv_heads": 2, "head_dim": 8}),
        ("torch", {"num_extra_keys": 1, "add_zero_attn": True}),
        ("torch, zero key", {"num_extra_keys": 0}),
        ("fairseq, extra keys", {"add_zero_attn": False}),
        ("llama", {"xpos": RotaryEmbedding(8)}),
        ("llama", {"xpos": RotaryEmbedding(8, interleaved=False, base=9000.0)}),
        ("llama", {"xpos": None}),
        ("mistral", {"window": 4}),
        ("mistral", {"window": 6}),
        ("mistral", {"window": None}),
    ],
)
def test_another_function_of_the_same_parameters_fails(name: str, fields: dict[str, Any]) -> None:
    module = make(name)
    report = convert.check(module, changed(convert.from_module(module), **fields))
    assert report.changed == ()
    assert not report.passed


@pytest.mark.parametrize("field", ["bidirectional", "max_distance", "num_buckets"])
def test_another_position_bias_of_the_same_table_fails(field: str) -> None:
    module = make("t5, encoder bias")
    attention, bias = converted(module)
    assert bias is not None
    value = {"bidirectional": False, "max_distance": 24, "num_buckets": 32}[field]
    other = RelativePositionBias(
        **{"bidirectional": True, "max_distance": 20, "num_buckets": 32, field: value},  # type: ignore[arg-type]  # of three types
        n_heads=4,
    )
    other.load_state_dict(bias.state_dict())
    report = convert.check(module, attention, rel_pos=other)
    assert report.changed == ()
    assert report.passed == (field == "num_buckets")


@pytest.mark.parametrize("gradient", ["inputs", "parameters"])
def test_wrong_gradients_fail(gradient: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = make("bart")
    attention = convert.from_module(module)
    right = checking._Pair._ours

    def wrong(self: Any, *arguments: Any) -> tuple[list[Tensor], list[Tensor]]:
        found = {"inputs": 0, "parameters": 1}
        both = right(self, *arguments)
        both[found[gradient]][-1].view(-1)[0] += 1e-3
        return both

    monkeypatch.setattr(checking._Pair, "_ours", wrong)
    report = convert.check(module, attention)
    assert not report.passed
    assert all(getattr(case, gradient) > 1e-6 for case in report.cases[:-1])


def test_fairseq_decodes_with_zeros_and_not_with_a_learned_key() -> None:
    for name, decodes in (("fairseq, zero key", True), ("fairseq, learned key", False)):
        module = make(name)
        report = convert.check(module, convert.from_module(module))
        assert (report.cases[-1].name == "decoding token by token") == decodes
        assert ("decoding" in report.not_compared) != decodes
        assert any(case.name == "self, every key hidden" for case in report.cases)
        assert "queries whose keys are all hidden" not in report.not_compared
    reason = "with add_bias_kv fairseq's cache has the learned key once more at each step"
    assert report.not_compared["decoding"] == reason


@pytest.mark.parametrize("name", ["bart", "t5", "bert, cross", "gpt2, cross", "fairseq, cross"])
def test_a_cross_attention_decodes_over_an_encoders_keys(name: str) -> None:
    module = make(name)
    attention = convert.from_module(module, encoder_decoder_attention=True)
    report = convert.check(module, attention)
    assert report.passed, str(report)
    assert report.cases[-1].name == "decoding, cross"
    assert "decoding" not in report.not_compared
    attention.scale *= 1.1
    assert not convert.check(module, attention).cases[-1].within(report.tolerance)


def test_a_cross_attention_without_a_cache_of_its_own_is_compared_otherwise() -> None:
    module = make("torchscale, cross")
    report = convert.check(module, convert.from_module(module))
    assert report.passed
    assert report.not_compared["decoding"] == "this torchscale MultiheadAttention is not for it"


@pytest.mark.parametrize(
    ("name", "part", "cross"),
    [
        ("bart", "", False), ("bart", "", True), ("t5", "", True),
        ("bert", "self", False), ("bert, cross", "self", True),
    ],
)  # fmt: skip
def test_what_no_cache_knows_is_compared_without(name: str, part: str, cross: bool) -> None:
    module = make(name)
    module.get_submodule(part).layer_idx = None  # type: ignore[assignment]  # no tensor
    attention = convert.from_module(module, encoder_decoder_attention=cross)
    report = convert.check(module, attention)
    assert report.passed, str(report)
    assert report.not_compared["decoding"] == (
        "the module has no layer_idx, by which caches of Transformers know it"
    )


def test_nothing_compared_is_not_a_pass() -> None:
    module = make("torch")
    report = convert.check(module, convert.from_module(module))
    assert not dataclasses.replace(report, cases=()).passed
    nan = dataclasses.replace(report.cases[0], output=float("nan"))
    assert not dataclasses.replace(report, cases=(nan,)).passed


def test_a_report_is_a_table() -> None:
    module = make("mistral")
    text = str(convert.check(module, convert.from_module(module)))
    first, second, columns, *rows = text.splitlines()
    assert first == "transformers MistralAttention and zeta.nn.MultiheadAttention: equal"
    assert second == "largest errors, relative, in float64; up to 1e-05 passes"
    assert columns.split() == ["output", "weights", "inputs", "parameters"]
    assert any(row.startswith("  decoding token by token") for row in rows)
    assert "parameters the same bit for bit: 4 of 4" in rows
    assert "  dropout: the two draw from different generators; both are run without it" in rows
    assert len({len(row) for row in [columns, *rows[: rows.index("not compared:") - 1]]}) == 1


def test_a_window_wider_than_the_inputs_is_not_called_compared() -> None:
    module = make("mistral")
    report = convert.check(module, convert.from_module(module), length=5)
    assert report.not_compared["window"] == "it is 5 tokens wide, the inputs 5 long"
    assert "window" not in convert.check(module, convert.from_module(module)).not_compared


@pytest.mark.parametrize("name", EVERY_KIND)
def test_float32_is_enough(name: str) -> None:
    module = make(name)
    attention, bias = converted(module)
    report = convert.check(module, attention, rel_pos=bias, dtype=torch.float32)
    assert report.tolerance == 1e-4
    assert report.passed, str(report)
