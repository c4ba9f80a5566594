"""What cannot be converted is refused, by name, and stays as it is."""

import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.convert.sources import LLAMA, make, torchscale, transformers
from tests.convert.textbooks import FairseqAttention
from zeta import convert
from zeta.convert import ConversionError
from zeta.nn import MultiheadAttention, RelativePositionBias, RotaryEmbedding
from zeta.nn.positions import Rotation


class Subclass(nn.MultiheadAttention):
    def forward(self, *arguments: Any, **options: Any) -> Any:
        return super().forward(*arguments, **options)


class Adapter(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def with_(module: nn.Module, **parts: Any) -> nn.Module:
    for name, part in parts.items():
        owner, _, attribute = name.rpartition("__")
        setattr(module.get_submodule(owner) if owner else module, attribute, part)
    return module


def llama(**rope: Any) -> nn.Module:
    parameters = {"rope_type": "default", "rope_theta": 10000.0, **rope}
    config = {**LLAMA, "rope_parameters": parameters}
    return transformers("llama", "LlamaAttention", config, layer_idx=0)


def parametrized() -> nn.Module:
    module = torchscale()
    nn.utils.parametrizations.weight_norm(module.q_proj)
    return module


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "an unknown class": (
        lambda: nn.Linear(4, 4),
        "cannot convert torch.nn.modules.linear.Linear; known are torch.nn.MultiheadAttention, "
        "torchscale MultiheadAttention",
    ),
    "one of ours": (
        lambda: MultiheadAttention(None, 8, 2),
        "the module is a zeta.nn.MultiheadAttention already",
    ),
    "a forward of its own": (
        lambda: Subclass(8, 2),
        "it is a torch.nn.modules.activation.MultiheadAttention with a forward of its own",
    ),
    "a replaced forward": (
        lambda: with_(nn.MultiheadAttention(8, 2), forward=lambda *_: None),
        "cannot convert this torch.nn.modules.activation.MultiheadAttention: its forward has been "
        "replaced",
    ),
    "fairseq's beams": (
        lambda: with_(FairseqAttention(8, 2), beam_size=4),
        "beam_size cannot be converted",
    ),
    "an adapter": (
        lambda: with_(torchscale(), q_proj=Adapter(16, 16)),
        "q_proj of this torchscale MultiheadAttention is a tests.convert.test_refusals.Adapter, "
        "whose computation is not known",
    ),
    "an adapter beside": (
        lambda: with_(make("llama"), q_proj__lora=nn.Linear(2, 2)),
        "transformers LlamaAttention has unknown q_proj.lora.bias, q_proj.lora.weight",
    ),
    "integers for weights": (
        lambda: with_(
            make("bart"), q_proj__weight=nn.Parameter(torch.ones(16, 16).to(torch.int8), False)
        ),
        "q_proj.weight of this transformers BartAttention must hold real numbers; got torch.int8",
    ),
    "a missing projection": (
        lambda: with_(make("bart"), k_proj=nn.Identity()),
        "transformers BartAttention lacks k_proj.weight",
    ),
    "a wrong shape": (
        lambda: with_(make("bart"), k_proj=nn.Linear(16, 12)),
        "k_proj.weight must have shape (16, 16); got (12, 16)",
    ),
    "a parametrization": (parametrized, "q_proj.parametrizations.weight.original0"),
    "rotations that change with the length": (
        lambda: llama(rope_type="dynamic", factor=2.0),
        "rope_type='dynamic' cannot be converted: its frequencies change with the length",
    ),
    "partial rotations": (
        lambda: llama(partial_rotary_factor=0.5),
        "partial_rotary_factor=0.5 cannot be converted",
    ),
    "BERT without its projection": (
        lambda: make("bert").self,
        "BertSelfAttention has no output projection: convert the BertAttention",
    ),
    "splits that differ": (
        lambda: with_(make("torchscale, multiway"), q_proj__split_position=3),
        "split_position must be one number for all multiway modules inside",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    make_it, words = REFUSED[name]
    module = make_it()
    assert isinstance(module, nn.Module)
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    with pytest.raises(ConversionError, match=re.escape(words)):
        convert.from_module(module)
    after = module.state_dict()
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor)


def test_a_refusal_is_a_value_error() -> None:
    assert issubclass(ConversionError, ValueError)


@pytest.mark.parametrize("wrong", [None, 3, "torch", nn.MultiheadAttention])
def test_no_module(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"module must be an nn\.Module; got"):
        convert.from_module(wrong)


def test_self_attention_is_not_made_cross_attention() -> None:
    with pytest.raises(ConversionError, match="this transformers ViTAttention is for self-att"):
        convert.from_module(make("vit"), encoder_decoder_attention=True)


def ours(**options: Any) -> MultiheadAttention:
    return MultiheadAttention(options.pop("args", None), 16, 4, **options)


class Twist(Rotation):
    head_dim = 4


@pytest.mark.parametrize(
    ("attention", "kind", "words"),
    [
        (ours(num_kv_heads=2), "torch", "num_kv_heads=2"),
        (ours(head_dim=8), "bart", "head_dim=8"),
        (ours(kdim=12, vdim=10), "gpt2", "kdim=12; vdim=10"),
        (ours(scale=1.0), "torch", "scale=1.0"),
        (ours(bias=False), "t5", "scale=1/sqrt(head_dim)"),
        (ours(scale=1.0), "t5", "biases of all projections"),
        (ours(bias=False), "bert", "biases of no projection"),
        (ours(self_attention=True, subln=True), "torch", "subln=True"),
        (ours(self_attention=True, args={"xpos_rel_pos": True}), "torch", "xpos_scale_base=512"),
        (ours(self_attention=True, position=RotaryEmbedding(4)), "vit", "position=Rotary("),
        (ours(self_attention=True, window=3), "llama", "window=3"),
        (ours(args={"multiway": True}), "fairseq", "multiway=2"),
        (ours(args={"multiway": 3}), "torchscale", "multiway=3: TorchScale has two ways"),
        (ours(qk_norm="rms"), "torch", "qk_norm=rms"),
        (ours(add_bias_kv=True), "torchscale", "add_bias_kv=True"),
        (ours(add_zero_attn=True), "bert", "add_zero_attn=True"),
        (ours(position=Twist()), "torch", "position=Twist cannot be converted"),
        (ours(bias=False), "mistral", "needs position=RotaryEmbedding(head_dim, interleaved=Fal"),
        (ours(args={"multiway": True}), "zetascale", "zetascale is imported as `zeta`"),
        (ours(), "fairseq", "this needs fairseq: pip install fairseq"),
    ],
)
def test_what_another_kind_cannot_express(
    attention: MultiheadAttention, kind: str, words: str
) -> None:
    with pytest.raises(ConversionError, match=re.escape(words)):
        convert.to_module(attention, kind)


def test_every_reason_is_given() -> None:
    attention = ours(num_kv_heads=2, qk_norm="l2", window=2)
    words = "torch.nn.MultiheadAttention cannot express num_kv_heads=2; window=2; qk_norm=l2"
    with pytest.raises(ConversionError, match=re.escape(words)):
        convert.to_module(attention, "torch")


def test_an_unknown_kind() -> None:
    with pytest.raises(ValueError, match=r"kind must be one of torch, torchscale,.*; got 'jax'"):
        convert.to_module(ours(), "jax")


def test_to_module_takes_ours_only() -> None:
    with pytest.raises(TypeError, match=r"must be a zeta\.nn\.MultiheadAttention; got Linear"):
        convert.to_module(nn.Linear(2, 2), "torch")  # type: ignore[arg-type]  # the wrong type


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.models.bart", None)
    with pytest.raises(ConversionError, match="pip install 'zeta-attention\\[transformers\\]'"):
        convert.to_module(ours(), "bart")


def test_a_position_bias_comes_from_t5_alone() -> None:
    for module in (make("t5"), nn.Linear(2, 2)):
        with pytest.raises(ConversionError, match="a relative position bias comes from"):
            convert.relative_position_bias(module)


def test_a_table_that_is_more_than_a_parameter_is_refused() -> None:
    class Doubled(nn.Embedding):
        def forward(self, index: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(index)

    module = with_(make("t5, encoder bias"), relative_attention_bias=Doubled(32, 4))
    words = "relative_attention_bias of this transformers T5Attention is a .*Doubled, whose comput"
    with pytest.raises(ConversionError, match=words):
        convert.relative_position_bias(module)
    module = make("t5, encoder bias")
    with_(module, relative_attention_bias__forward=lambda index: index)
    with pytest.raises(ConversionError, match=r"is a .*Embedding, whose computation is not known"):
        convert.relative_position_bias(module)


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"batch": 0}, ValueError, "batch must be at least 1"),
        ({"length": 1}, ValueError, "length at least 2"),
        ({"dtype": torch.float16}, ValueError, "dtype must be torch.float64 or torch.float32"),
        ({"rel_pos": torch.zeros(3)}, TypeError, "rel_pos must be a RelativePositionBias"),
        ({"rel_pos": RelativePositionBias(n_heads=4)}, ConversionError, "takes no rel_pos"),
        ({"attention": nn.Linear(2, 2)}, TypeError, "attention must be a zeta.nn.Multihead"),
        ({"module": nn.Linear(2, 2)}, ConversionError, "cannot convert torch.nn.modules.linear"),
    ],
)
def test_check_refuses(options: dict[str, Any], kind: type[Exception], words: str) -> None:
    module = nn.MultiheadAttention(16, 4)
    usual = {"module": module, "attention": convert.from_module(module)}
    with pytest.raises(kind, match=re.escape(words)):
        convert.check(**{**usual, **options})


def test_check_needs_the_position_bias() -> None:
    module = make("t5, encoder bias")
    with pytest.raises(ConversionError, match=r"needs rel_pos, its zeta\.convert\.relative_posit"):
        convert.check(module, convert.from_module(module))


def test_check_needs_parameters_of_one_name() -> None:
    module: Any = make("bart")
    module.v_proj = module.k_proj
    words = "k_proj.weight and v_proj.weight are one parameter, whose gradient is not that of eit"
    with pytest.raises(ConversionError, match=words):
        convert.check(module, convert.from_module(module))


def test_check_needs_numbers() -> None:
    module = nn.MultiheadAttention(16, 4, device="meta")
    with pytest.raises(ConversionError, match="on the meta device has no numbers"):
        convert.check(module, convert.from_module(module))


def test_an_attention_of_another_module_is_different() -> None:
    one, other = nn.MultiheadAttention(16, 4), nn.MultiheadAttention(16, 4, bias=False)
    report = convert.check(one, convert.from_module(other))
    assert not report.passed
    assert "q_proj.bias" in report.changed
