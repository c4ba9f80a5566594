"""Transformers' ``GPT2Attention``: projections packed in one ``Conv1D``, with inputs as rows."""

import dataclasses
from collections.abc import Collection
from typing import Any

from torch import nn

from zeta.convert.forms import WITH_BIASES, Form, scale_of
from zeta.convert.huggingface import NOT_COMPARED, attention_class, config_class, run_with
from zeta.convert.source import Source
from zeta.convert.tables import Table, linear


def _conv(source: str, *zeta: str) -> Table:
    return linear(source, *zeta, transposed=True)


_TABLE: Table = (*_conv("c_attn", "q_proj", "k_proj", "v_proj"), *_conv("c_proj", "out_proj"))
_CROSS: Table = (
    *_conv("q_attn", "q_proj"),
    *_conv("c_attn", "k_proj", "v_proj"),
    *_conv("c_proj", "out_proj"),
)


def _read(module: Any) -> Form:
    return Form.plain(
        module.embed_dim,
        module.num_heads,
        scale=scale_of(module.scaling, module.head_dim),
        dropout=module.attn_dropout.p,
        self_attention=not module.is_cross_attention,
        encoder_decoder_attention=module.is_cross_attention,
    )


def _settle(form: Form, keys: Collection[str]) -> Form:
    cross = "q_attn.weight" in keys
    return dataclasses.replace(form, self_attention=not cross, encoder_decoder_attention=cross)


def _build(form: Form) -> nn.Module:
    config = config_class("gpt2", "GPT2Config")(
        n_embd=form.embed_dim, n_head=form.num_heads, attn_pdrop=form.dropout, resid_pdrop=0.0
    )
    built: nn.Module = attention_class("gpt2", "GPT2Attention")(
        config, is_cross_attention=form.encoder_decoder_attention, layer_idx=0
    )
    return built


def _compute_as_given(module: Any) -> None:
    """Scores in the inputs' precision: its own float32 is narrower than what a proof runs in."""
    module.reorder_and_upcast_attn = False


GPT2 = Source(
    kind="gpt2",
    title="transformers GPT2Attention",
    classes=frozenset({"transformers.models.gpt2.modeling_gpt2.GPT2Attention"}),
    tables=(_TABLE, _CROSS),
    read=_read,
    settle=_settle,
    build=_build,
    runner=run_with(
        mask="attention_mask",
        memory="encoder_hidden_states",
        memory_mask="encoder_attention_mask",
        cached=lambda module: not module.is_cross_attention,
        cached_memory=lambda module: module.is_cross_attention,
        prepare=_compute_as_given,
    ),
    biases=(WITH_BIASES,),
    dropped=frozenset({"bias", "masked_bias"}),
    not_compared={**NOT_COMPARED, "resid_dropout": "it follows the attention"},
)
