"""Transformers' ``ViTAttention``; also the keys that checkpoints have had from the beginning."""

import dataclasses
from typing import Any

from torch import nn

from zeta.convert.forms import PROJECTIONS, WITH_BIASES, Form, scale_of
from zeta.convert.huggingface import NOT_COMPARED, attention_class, config_class, run_with
from zeta.convert.source import Source
from zeta.convert.tables import Table, linear

_OUTPUT_BIAS = frozenset({"out_proj"})
_TABLE: Table = (
    *(entry for name in PROJECTIONS[:3] for entry in linear(name, name)),
    *linear("o_proj", "out_proj"),
)
_CHECKPOINT: Table = (
    *linear("attention.query", "q_proj"),
    *linear("attention.key", "k_proj"),
    *linear("attention.value", "v_proj"),
    *linear("output.dense", "out_proj"),
)


def _read(module: Any) -> Form:
    return Form.plain(
        module.q_proj.in_features,
        module.num_attention_heads,
        head_dim=module.head_dim,
        scale=scale_of(module.scaling, module.head_dim),
        dropout=module.attention_dropout,
        self_attention=True,
    )


def _build(form: Form) -> nn.Module:
    config = config_class("vit", "ViTConfig")(
        hidden_size=form.embed_dim,
        num_attention_heads=form.num_heads,
        attention_probs_dropout_prob=form.dropout,
        qkv_bias=form.biases == WITH_BIASES,
    )
    built: nn.Module = attention_class("vit", "ViTAttention")(config)
    return built


VIT = Source(
    kind="vit",
    title="transformers ViTAttention",
    classes=frozenset({"transformers.models.vit.modeling_vit.ViTAttention"}),
    tables=(_TABLE, _CHECKPOINT),
    read=_read,
    settle=lambda form, keys: dataclasses.replace(form, self_attention=True),
    build=_build,
    tolerance=1e-5,
    runner=run_with(mask="attention_mask", memory=None),
    biases=(WITH_BIASES, _OUTPUT_BIAS),
    not_compared={**NOT_COMPARED, "decoding": "ViTAttention has no cache"},
)
