"""State dicts of whole models: every attention found, converted, proven; the rest as it was."""

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.convert.sources import kind_of, make
from tests.convert.textbooks import FairseqAttention
from zeta import convert
from zeta.convert import ConversionError, convert_state_dict
from zeta.convert.checkpoints import prove
from zeta.convert.tables import Entry, from_zeta, linear, to_zeta


def model(name: str, head: str, **config: Any) -> Any:
    """A small model of Transformers."""
    modeling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    configs = importlib.import_module(f"transformers.models.{name}.configuration_{name}")
    return getattr(modeling, head)(getattr(configs, head[:-5] + "Config")(**config))


SMALL = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 24}
MODELS: dict[str, tuple[Callable[[], Any], int]] = {
    "torch": (lambda: nn.Transformer(16, 4, 2, 1, 24, batch_first=True), 4),
    "t5": (
        lambda: model("t5", "T5Model", d_model=16, d_kv=5, num_heads=4, num_layers=2, d_ff=24,
                      vocab_size=20), 6,
    ),
    "bart": (
        lambda: model("bart", "BartModel", d_model=16, encoder_attention_heads=4,
                      decoder_attention_heads=4, encoder_layers=1, decoder_layers=1, vocab_size=20,
                      encoder_ffn_dim=24, decoder_ffn_dim=24), 3,
    ),
    "bert": (lambda: model("bert", "BertModel", **SMALL, num_hidden_layers=2, vocab_size=20), 2),
    "vit": (
        lambda: model("vit", "ViTModel", **SMALL, num_hidden_layers=2, image_size=8, patch_size=4),
        2,
    ),
    "gpt2": (lambda: model("gpt2", "GPT2Model", n_embd=16, n_head=4, n_layer=2, vocab_size=20), 2),
    "llama": (
        lambda: model("llama", "LlamaModel", **SMALL, num_key_value_heads=2, num_hidden_layers=2,
                      vocab_size=20), 2,
    ),
    "mistral": (
        lambda: model("mistral", "MistralModel", **SMALL, num_key_value_heads=2,
                      num_hidden_layers=1, vocab_size=20), 1,
    ),
}  # fmt: skip


def inside(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    """A state dict with one attention under a prefix, and something else."""
    state = {f"{prefix}{key}": tensor for key, tensor in module.state_dict().items()}
    return {"embed.weight": torch.randn(3, 3), **state, "norm.weight": torch.randn(3)}


@pytest.mark.parametrize("kind", MODELS)
def test_every_attention_of_a_model(kind: str) -> None:
    build, count = MODELS[kind]
    state = build().state_dict()
    before = dict(state)
    result = convert_state_dict(state, kind)
    assert len(result.attentions) == count
    assert result.others == ()
    taken = {found.prefix + key for found in result.attentions for key in found.before}
    for key, tensor in before.items():
        assert state[key] is tensor
        if key not in taken:
            assert result.state[key] is tensor
    for found in result.attentions:
        report = prove(found.zeta, found.before, kind, 4, found.name)
        assert report.passed, str(report)
        for key, tensor in found.after.items():
            assert result.state[found.prefix + key] is tensor
    back = convert_state_dict(result.state, "zeta", kind)
    assert back.state.keys() == before.keys()
    for key, tensor in before.items():
        assert torch.equal(back.state[key], tensor)


SINGLE = ["torch, separate", "torch, learned key", "torchscale, subln, xpos",
          "torchscale, multiway", "fairseq", "fairseq, learned key", "zetascale, subln, xpos",
          "gpt2, cross"]  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "decoder.layers.0.attn."])
@pytest.mark.parametrize("name", SINGLE)
def test_a_single_attention(name: str, prefix: str) -> None:
    module, kind = make(name), kind_of(name)
    state = inside(prefix, module) if prefix else dict(module.state_dict())
    (found,) = convert_state_dict(state, kind).attentions
    assert found.prefix == prefix
    ours = convert.from_module(module).state_dict()
    assert found.after.keys() == ours.keys()
    for key, tensor in found.after.items():
        assert torch.equal(tensor, ours[key])
    report = prove(found.zeta, found.before, kind, 4, found.name)
    assert report.passed, str(report)


@pytest.mark.parametrize(("source", "target"), [("torch", "fairseq"), ("fairseq", "torch")])
def test_a_learned_key_between_two_kinds(source: str, target: str) -> None:
    state = inside("a.", make(f"{source}, learned key"))
    found = convert_state_dict(state, source, target)
    assert torch.equal(found.state["a.bias_k"], state["a.bias_k"])
    (attention,) = found.attentions
    assert prove(attention.zeta, attention.after, target, 4, "it").passed
    back = convert_state_dict(found.state, target, source).state
    assert all(torch.equal(back[key], tensor) for key, tensor in state.items())


def test_the_proof_needs_the_tensors_of_the_file() -> None:
    (found,) = convert_state_dict(make("torch").state_dict(), "torch").attentions
    wrong = {**found.zeta, "v_proj.weight": found.zeta["v_proj.weight"].flip(0)}
    report = prove(wrong, found.before, "torch", 4, "it")
    assert report.changed == ("v_proj.weight",)
    assert not any(case.within(1e-3) for case in report.cases)
    (found,) = convert_state_dict(make("torch, learned key").state_dict(), "torch").attentions
    wrong = {**found.zeta, "bias_v": found.zeta["bias_v"].flip(2)}
    report = prove(wrong, found.before, "torch", 4, "it")
    assert report.changed == ("bias_v",)
    assert not any(case.within(1e-3) for case in report.cases)


def test_what_stands_in_is_named() -> None:
    (found,) = convert_state_dict(make("fairseq").state_dict(), "fairseq").attentions
    report = prove(found.zeta, found.before, "fairseq", 4, "it")
    assert report.source == "fairseq MultiheadAttention"
    assert report.not_compared["fairseq itself"] == (
        "torch.nn.MultiheadAttention computes the same, and ran in its place"
    )
    assert report.not_compared["names of tensors"] == (
        "torch.nn.MultiheadAttention has others; how they were renamed is not proven"
    )
    wrong = {**found.zeta, "v_proj.weight": found.zeta["v_proj.weight"].flip(0)}
    report = prove(wrong, found.before, "fairseq", 4, "it")
    assert report.changed == ("v_proj.weight",)
    assert not report.passed


def test_a_file_with_other_names_than_its_modules(tmp_path: Path) -> None:
    module = MODELS["vit"][0]()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    module.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert state.keys() != module.state_dict().keys()
    attentions = [part for part in module.modules() if type(part).__name__ == "ViTAttention"]
    result = convert_state_dict(state, "vit")
    for found, attention in zip(result.attentions, attentions, strict=True):
        ours = convert.from_module(attention).state_dict()
        assert found.zeta.keys() == ours.keys()
        assert all(torch.equal(found.zeta[key], tensor) for key, tensor in ours.items())
        report = prove(found.zeta, found.before, "vit", 4, found.name)
        assert report.passed, str(report)
        assert report.not_compared["names of tensors"] == (
            "transformers ViTAttention has others; how they were renamed is not proven"
        )
        wrong = {**found.zeta, "v_proj.bias": found.zeta["v_proj.bias"].flip(0)}
        assert prove(wrong, found.before, "vit", 4, "it").changed == ("v_proj.bias",)


def test_a_proof_without_a_tensor_says_which() -> None:
    (found,) = convert_state_dict(make("torch").state_dict(), "torch").attentions
    words = r"^torch\.nn\.MultiheadAttention lacks in_proj_bias, out_proj\.bias$"
    with pytest.raises(ConversionError, match=words):
        prove(
            found.zeta, {k: t for k, t in found.before.items() if "bias" not in k}, "torch", 4, ""
        )


def test_old_fairseq_keys() -> None:
    module = FairseqAttention(16, 4)
    new = module.state_dict()
    old = {f"out_proj.{name}": new[f"out_proj.{name}"] for name in ("weight", "bias")}
    for name in ("weight", "bias"):
        old[f"in_proj_{name}"] = torch.cat([new[f"{part}_proj.{name}"] for part in "qkv"])
    (found,) = convert_state_dict(old, "fairseq").attentions
    for key, tensor in new.items():
        assert torch.equal(found.after[key], tensor)
    assert prove(found.zeta, found.before, "fairseq", 4, "it").passed


def test_old_keys_of_transformers() -> None:
    vit = make("vit").state_dict()
    names = {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value",
             "o_proj": "output.dense"}  # fmt: skip
    prefix = "vit.encoder.layer.0.attention."
    old = {
        prefix + names[key.split(".")[0]] + "." + key.split(".")[1]: tensor
        for key, tensor in vit.items()
    }
    (found,) = convert_state_dict(old, "vit").attentions
    assert found.prefix == prefix
    assert torch.equal(found.after["out_proj.bias"], vit["o_proj.bias"])

    gpt2 = inside("h.0.attn.", make("gpt2"))
    gpt2["h.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8).tril()
    gpt2["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    result = convert_state_dict(gpt2, "gpt2")
    assert result.dropped == ("h.0.attn.bias", "h.0.attn.masked_bias")
    assert not any("bias" in key.split(".")[3] for key in result.state if key.count(".") == 3)


def test_what_belongs_to_another_kind_is_left_and_named() -> None:
    state = inside("text.0.self_attn.", make("llama")) | inside("image.0.self_attn.", make("bart"))
    result = convert_state_dict(state, "llama")
    assert [found.prefix for found in result.attentions] == ["text.0.self_attn."]
    assert result.others == ("image.0.self_attn.",)
    assert (
        result.state["image.0.self_attn.q_proj.weight"] is state["image.0.self_attn.q_proj.weight"]
    )


def without(state: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name != key}


LLAMA_STATE = inside("a.", make("llama"))
TORCH_STATE = inside("a.", make("torch"))


@pytest.mark.parametrize(
    ("state", "kind", "words"),
    [
        ({}, "torch", "there is no attention of kind torch: no keys that end in in_proj_weight"),
        (LLAMA_STATE, "torch", "there is no attention of kind torch"),
        (LLAMA_STATE, "bart", "kind bart: no keys that end in q_proj.weight; a. is of another"),
        (without(LLAMA_STATE, "a.v_proj.weight"), "llama", "a lacks v_proj.weight; is this one of"),
        (without(TORCH_STATE, "a.out_proj.weight"), "torch", "a lacks out_proj.weight"),
        ({**TORCH_STATE, "a.bias_q": torch.ones(1)}, "torch", "a has unknown bias_q"),
        ({**TORCH_STATE, "a.bias_k": torch.ones(1)}, "torch",
         "a must have bias_k and bias_v of shape (1, 1, 16); got bias_k (1,)"),
        ({**TORCH_STATE, "a.bias_k": torch.ones(1, 1, 16), "a.bias_v": torch.ones(1, 1, 8)},
         "torch", "of shape (1, 1, 16); got bias_k (1, 1, 16), bias_v (1, 1, 8)"),
        ({**inside("a.", make("torchscale")), "a.bias_k": torch.ones(1, 1, 16)}, "torchscale",
         "a has unknown bias_k"),
        (without(inside("a.", make("bart")), "a.q_proj.bias"), "torch", "no attention of kind"),
        ({**TORCH_STATE, "a.in_proj_weight": torch.ones(47, 16)}, "torch",
         "in_proj_weight of a must have rows for q_proj.weight, k_proj.weight, v_proj.weight, equ"),
        ({**TORCH_STATE, "a.in_proj_weight": torch.ones(3)}, "torch", "q_proj of a must be a mat"),
        ({**TORCH_STATE, "a.in_proj_weight": torch.ones(48, 16, dtype=torch.int8)}, "torch",
         "a.in_proj_weight must be a tensor of real numbers; got torch.int8"),
        ({**TORCH_STATE, "a.in_proj_weight": "text"}, "torch", "got str"),
        ({**TORCH_STATE, "a.in_proj_weight": torch.ones(48, 16).to_sparse()}, "torch",
         "a.in_proj_weight must be a dense tensor; got torch.sparse_coo"),
        ({**TORCH_STATE, "a.in_proj_weight": torch.ones(48, 12)}, "torch", "cannot have (out_proj"),
        (inside("a.", make("llama")), "t5", "there is no attention of kind t5"),
    ],
)  # fmt: skip
def test_refused(state: dict[str, Any], kind: str, words: str) -> None:
    with pytest.raises(ConversionError, match=re.escape(words)):
        convert_state_dict(state, kind)


def test_a_target_that_cannot_have_the_shapes() -> None:
    zeta = convert_state_dict(LLAMA_STATE, "llama").state
    with pytest.raises(ConversionError, match="num_kv_heads"):
        convert_state_dict(zeta, "zeta", "torch")
    subln = inside("a.", make("torchscale, subln, xpos"))
    with pytest.raises(ConversionError, match=r"unknown inner_attn_ln\.bias"):
        convert_state_dict(subln, "zeta", "torch")
    extra = convert_state_dict(inside("a.", make("torch, extra keys")), "torch").state
    for kind in ("torchscale", "bart"):
        with pytest.raises(ConversionError, match="unknown bias_k, bias_v"):
            convert_state_dict(extra, "zeta", kind)
    ours = convert_state_dict(TORCH_STATE, "torch").state
    for kind in ("t5", "mistral"):
        with pytest.raises(ConversionError, match="a has biases of k_proj, out_proj, q_proj, v_pr"):
            convert_state_dict(ours, "zeta", kind)
    partial = {key: t for key, t in inside("a.", make("bart")).items() if key != "a.q_proj.bias"}
    with pytest.raises(ConversionError, match="a has biases of k_proj, out_proj, v_proj, as"):
        convert_state_dict(partial, "zeta", "torch")


@pytest.mark.parametrize(
    ("name", "target", "words"),
    [
        ("t5", "torch", "T5Attention and torch.nn.MultiheadAttention differ in what no tensor "
         "tells: the factor of the scores"),
        ("t5", "bart", "the factor of the scores"),
        ("llama", "torch", "the rotation of queries and keys"),
        ("torch, no bias", "llama", "the rotation of queries and keys"),
        ("llama", "t5", "the factor of the scores and the rotation of queries and keys"),
    ],
)  # fmt: skip
def test_kinds_whose_scores_differ_in_what_no_tensor_tells(
    name: str, target: str, words: str
) -> None:
    state = inside("a.", make(name))
    with pytest.raises(ConversionError, match=f"{re.escape(words)}$"):
        convert_state_dict(state, kind_of(name), target)


def test_kinds_of_the_same_scores_are_converted_directly() -> None:
    state = inside("a.", make("mistral, no window"))
    (found,) = convert_state_dict(state, "mistral", "llama").attentions
    assert prove(found.zeta, found.after, "llama", 4, "it").passed


@pytest.mark.parametrize(("source", "target"), [("jax", "zeta"), ("torch", "jax")])
def test_unknown_kinds(source: str, target: str) -> None:
    with pytest.raises(ValueError, match=r"kind must be one of zeta, torch, torchscale,.*'jax'"):
        convert_state_dict({}, source, target)


@pytest.mark.parametrize("state", [None, 3, [("w", 1)], {0: torch.ones(1)}])
def test_no_state_dict(state: Any) -> None:
    with pytest.raises(TypeError, match="state must be a mapping of names to tensors; got"):
        convert_state_dict(state, "torch")


def test_the_same_kind_twice() -> None:
    with pytest.raises(ValueError, match="source and target are both 'torch'"):
        convert_state_dict({}, "torch", "torch")


@pytest.mark.parametrize(
    ("num_heads", "words"),
    [
        (None, "the shapes of it do not tell the number of heads"),
        (3, "32 features of it cannot be shared by 3 heads"),
        (32, "head_dim must be even"),
        (1, "32 features of queries and 16 of keys, which are not 1 heads and equal shares"),
    ],
)
def test_heads_that_do_not_fit(num_heads: int | None, words: str) -> None:
    (found,) = convert_state_dict(LLAMA_STATE, "llama").attentions
    with pytest.raises(ConversionError, match=words):
        prove(found.zeta, found.before, "llama", num_heads, "it")


TABLE = (*linear("in", "a", "b"), *linear("t", "c", transposed=True))


def test_tables_go_both_ways() -> None:
    state = {
        "in.weight": torch.randn(6, 4),
        "in.bias": torch.randn(6),
        "t.weight": torch.randn(2, 5),
    }
    zeta = to_zeta(state, TABLE)
    assert torch.equal(zeta["a.weight"], state["in.weight"][:3])
    assert torch.equal(zeta["b.bias"], state["in.bias"][3:])
    assert torch.equal(zeta["c.weight"], state["t.weight"].T)
    assert all(tensor.is_contiguous() for tensor in zeta.values())
    back = from_zeta(zeta, TABLE)
    assert back.keys() == state.keys()
    for key, tensor in state.items():
        assert torch.equal(back[key], tensor)
        assert back[key].data_ptr() != tensor.data_ptr()


def test_tables_name_every_key_that_is_wrong() -> None:
    with pytest.raises(ConversionError, match=r"^it has unknown in\.wait, x and lacks t\.weight$"):
        to_zeta({"in.wait": torch.ones(1), "x": torch.ones(1), "in.weight": torch.ones(2, 2)},
                TABLE, "it")  # fmt: skip
    with pytest.raises(
        ConversionError, match=r"needs parts of one shape; it has a\.weight \(3, 4\)"
    ):
        from_zeta(
            {"a.weight": torch.ones(3, 4), "b.weight": torch.ones(2, 4), "c.weight": torch.ones(1)},
            TABLE,
            "it",
        )
    with pytest.raises(ConversionError, match=r"^it lacks b\.bias, for in\.bias$"):
        from_zeta(
            {
                "a.weight": torch.ones(2, 2),
                "b.weight": torch.ones(2, 2),
                "c.weight": torch.ones(2, 2),
                "a.bias": torch.ones(2),
            },
            TABLE,
            "it",
        )
    many = {f"k{n}": torch.ones(1) for n in range(12)}
    with pytest.raises(ConversionError, match="k0, k1, k10, k11, k2, k3, k4, k5 and 4 more"):
        to_zeta(many, (Entry("w", ("w",)),))


def test_what_zeta_lacks_is_said_of_zeta() -> None:
    with pytest.raises(ConversionError, match="there is no attention of kind zeta: no keys"):
        convert_state_dict(TORCH_STATE, "zeta", "torch")
