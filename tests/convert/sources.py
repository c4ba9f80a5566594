"""Small modules of every kind that is converted, each with random parameters."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torchscale.component.multihead_attention import MultiheadAttention as TorchScaleAttention

from tests.convert.textbooks import FairseqAttention, torchscale_args, torchscale_head, zetascale
from zeta import convert
from zeta.nn import MultiheadAttention, RelativePositionBias


def transformers(model: str, attention: str, config: dict[str, Any], **options: Any) -> nn.Module:
    """An attention of Transformers, with a configuration of these fields."""
    configs = importlib.import_module(f"transformers.models.{model}.configuration_{model}")
    modeling = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    name = attention.replace("Attention", "Config")
    made: nn.Module = getattr(modeling, attention)(getattr(configs, name)(**config), **options)
    return made


def bart(**options: Any) -> nn.Module:
    configs = importlib.import_module("transformers.models.bart.configuration_bart")
    modeling = importlib.import_module("transformers.models.bart.modeling_bart")
    made: nn.Module = modeling.BartAttention(
        16, 4, config=configs.BartConfig(), layer_idx=0, **options
    )
    return made


def torchscale(**options: Any) -> nn.Module:
    args = torchscale_args(**options.pop("args", {}))
    kind = {} if "encoder_decoder_attention" in options else {"self_attention": True}
    made: nn.Module = TorchScaleAttention(args, 16, 4, **{**kind, **options})
    return made


T5 = {"d_model": 24, "d_kv": 5, "num_heads": 4}
BERT = {"hidden_size": 16, "num_attention_heads": 4}
GPT2 = {"n_embd": 16, "n_head": 4}
LLAMA = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
ROPE = {"rope_type": "default", "rope_theta": 500.0}
# Of four pairs of features some are fast, some slow and some between.
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.5}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 48,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 100.0, "factor": 8.0, "beta_fast": 6.0, "beta_slow": 0.5,
    "original_max_position_embeddings": 48,
}  # fmt: skip
UNTRUNCATED = {**YARN, "truncate": False, "attention_factor": 1.3}

Make = Callable[[], nn.Module]


def scaled(model: str, rope: dict[str, Any], **config: Any) -> nn.Module:
    """A Llama's or Mistral's attention with these ``rope_parameters``."""
    config = {**LLAMA, "max_position_embeddings": 384, "rope_parameters": dict(rope), **config}
    return transformers(model, f"{model.title()}Attention", config, layer_idx=0)


MODULES: dict[str, Make] = {
    "torch": lambda: nn.MultiheadAttention(16, 4, batch_first=True),
    "torch, sequence first": lambda: nn.MultiheadAttention(16, 4, dropout=0.2),
    "torch, separate": lambda: nn.MultiheadAttention(16, 4, kdim=12, vdim=10, batch_first=True),
    "torch, separate, no bias": lambda: nn.MultiheadAttention(16, 4, bias=False, kdim=12),
    "torch, no bias": lambda: nn.MultiheadAttention(16, 1, bias=False),
    "torch, learned key": lambda: nn.MultiheadAttention(
        16, 4, add_bias_kv=True, kdim=12, vdim=10, batch_first=True
    ),
    "torch, zero key": lambda: nn.MultiheadAttention(16, 4, bias=False, add_zero_attn=True),
    "torch, extra keys": lambda: nn.MultiheadAttention(
        16, 4, add_bias_kv=True, add_zero_attn=True
    ),
    "torchscale": torchscale,
    "torchscale, cross": lambda: torchscale(encoder_decoder_attention=True),
    "torchscale, subln, xpos": lambda: torchscale(
        subln=True, args={"xpos_rel_pos": True, "xpos_scale_base": 64, "layernorm_eps": 1e-3}
    ),
    "torchscale, multiway": lambda: torchscale(subln=True, args={"multiway": True}),
    "torchscale, head": lambda: torchscale_head(subln=True),
    "fairseq": lambda: FairseqAttention(16, 4, dropout=0.1),
    "fairseq, self": lambda: FairseqAttention(16, 4, self_attention=True, bias=False),
    "fairseq, learned key": lambda: FairseqAttention(
        16, 4, self_attention=True, add_bias_kv=True
    ),
    "fairseq, zero key": lambda: FairseqAttention(16, 4, self_attention=True, add_zero_attn=True),
    "fairseq, extra keys": lambda: FairseqAttention(
        16, 4, kdim=12, vdim=12, encoder_decoder_attention=True, add_bias_kv=True,
        add_zero_attn=True,
    ),
    "fairseq, cross": lambda: FairseqAttention(
        16, 4, kdim=12, vdim=12, encoder_decoder_attention=True
    ),
    "zetascale": lambda: zetascale(16, 4),
    "zetascale, subln, xpos": lambda: zetascale(16, 4, subln=True, xpos_rel_pos=True),
    "t5": lambda: transformers("t5", "T5Attention", T5, layer_idx=0),
    "t5, encoder bias": lambda: transformers(
        "t5", "T5Attention", {**T5, "relative_attention_max_distance": 20},
        layer_idx=0, has_relative_attention_bias=True,
    ),
    "t5, decoder bias": lambda: transformers(
        "t5", "T5Attention", {**T5, "is_decoder": True, "relative_attention_num_buckets": 16},
        layer_idx=0, has_relative_attention_bias=True,
    ),
    "bart": bart,
    "bart, no bias": lambda: bart(bias=False),
    "bert": lambda: transformers("bert", "BertAttention", BERT, layer_idx=0),
    "bert, cross": lambda: transformers(
        "bert", "BertAttention", BERT, layer_idx=0, is_cross_attention=True
    ),
    "vit": lambda: transformers("vit", "ViTAttention", BERT),
    "vit, no bias": lambda: transformers("vit", "ViTAttention", {**BERT, "qkv_bias": False}),
    "gpt2": lambda: transformers("gpt2", "GPT2Attention", GPT2, layer_idx=0),
    "gpt2, cross": lambda: transformers(
        "gpt2", "GPT2Attention", GPT2, layer_idx=0, is_cross_attention=True
    ),
    "gpt2, scaled by layer": lambda: transformers(
        "gpt2", "GPT2Attention",
        {**GPT2, "scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
        layer_idx=2,
    ),
    "gpt2, unscaled": lambda: transformers(
        "gpt2", "GPT2Attention", {**GPT2, "scale_attn_weights": False}, layer_idx=0
    ),
    "llama": lambda: transformers("llama", "LlamaAttention", LLAMA, layer_idx=0),
    "llama, biases, wide heads": lambda: transformers(
        "llama", "LlamaAttention",
        {**LLAMA, "head_dim": 10, "attention_bias": True, "rope_parameters": ROPE}, layer_idx=0,
    ),
    "llama, linear": lambda: scaled("llama", LINEAR),
    "llama, llama3": lambda: scaled("llama", LLAMA3),
    "llama, yarn": lambda: scaled("llama", YARN),
    "llama, yarn, untruncated": lambda: scaled("llama", UNTRUNCATED),
    "mistral": lambda: transformers(
        "mistral", "MistralAttention", {**LLAMA, "sliding_window": 5}, layer_idx=0
    ),
    "mistral, no window": lambda: transformers(
        "mistral", "MistralAttention", {**LLAMA, "sliding_window": None}, layer_idx=0
    ),
    "mistral, linear": lambda: scaled("mistral", LINEAR, sliding_window=5),
    "mistral, llama3": lambda: scaled("mistral", LLAMA3, sliding_window=None),
    "mistral, yarn": lambda: scaled("mistral", YARN, sliding_window=7),
}  # fmt: skip


def make(name: str) -> nn.Module:
    """A module of this name; every parameter random, norms and biases too."""
    module = MODULES[name]()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    return module


def kind_of(name: str) -> str:
    return name.partition(",")[0]


def converted(module: nn.Module) -> tuple[MultiheadAttention, RelativePositionBias | None]:
    """It as ours, and its position bias, if it has one."""
    has_bias = getattr(module, "has_relative_attention_bias", False)
    bias = convert.relative_position_bias(module) if has_bias else None
    return convert.from_module(module), bias
