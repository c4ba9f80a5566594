"""Transformers' ``BertAttention``: the attention proper, and the first of what follows it.

``BertAttention`` holds ``self``, whose output has no projection, and ``output``, which projects,
drops, adds the input and normalises. Attention here is ``self`` and the projection
``output.dense``; dropout, residual and LayerNorm stay where they are.
"""

import dataclasses
from typing import Any

from torch import nn

from zeta.convert.errors import ConversionError
from zeta.convert.forms import WITH_BIASES, Form, scale_of
from zeta.convert.huggingface import NOT_COMPARED, attention_class, config_class, run_with
from zeta.convert.source import Source
from zeta.convert.tables import Table, linear

_TABLE: Table = (
    *linear("self.query", "q_proj"),
    *linear("self.key", "k_proj"),
    *linear("self.value", "v_proj"),
    *linear("output.dense", "out_proj"),
)


def _read(module: Any) -> Form:
    attend = module.self
    kind = getattr(attend, "position_embedding_type", "absolute") or "absolute"
    if kind != "absolute":
        raise ConversionError(f"position_embedding_type={kind!r} cannot be converted")
    cross = getattr(module, "is_cross_attention", False)
    return Form.plain(
        attend.query.in_features,
        attend.num_attention_heads,
        head_dim=attend.attention_head_size,
        scale=scale_of(attend.scaling, attend.attention_head_size),
        dropout=attend.dropout.p,
        self_attention=not cross,
        encoder_decoder_attention=cross,
    )


def _build(form: Form) -> nn.Module:
    config = config_class("bert", "BertConfig")(
        hidden_size=form.embed_dim,
        num_attention_heads=form.num_heads,
        attention_probs_dropout_prob=form.dropout,
    )
    built: nn.Module = attention_class("bert", "BertAttention")(
        config, layer_idx=0, is_cross_attention=form.encoder_decoder_attention
    )
    return built


BERT = Source(
    kind="bert",
    title="transformers BertAttention",
    classes=frozenset({"transformers.models.bert.modeling_bert.BertAttention"}),
    tables=(_TABLE,),
    read=_read,
    settle=lambda form, keys: dataclasses.replace(form, self_attention=True),
    build=_build,
    runner=run_with(
        mask="attention_mask",
        memory="encoder_hidden_states",
        inner=lambda module: module.self,
        outer=lambda module: module.output.dense,
        cached=lambda module: not module.is_cross_attention,
        cached_memory=lambda module: module.is_cross_attention,
    ),
    biases=(WITH_BIASES,),
    apart=frozenset(f"output.LayerNorm.{name}" for name in ("weight", "bias", "gamma", "beta")),
    not_compared={
        **NOT_COMPARED,
        "dropout, residual and LayerNorm of output": "they follow the attention",
    },
)
