"""Transformers' ``BartAttention``, of an encoder, a decoder or between them."""

from typing import Any

from torch import nn

from zeta.convert.forms import PROJECTIONS, Form, scale_of
from zeta.convert.huggingface import NOT_COMPARED, attention_class, config_class, run_with
from zeta.convert.source import Source
from zeta.convert.tables import linear


def _read(module: Any) -> Form:
    return Form.plain(
        module.embed_dim,
        module.num_heads,
        scale=scale_of(module.scaling, module.head_dim),
        dropout=module.dropout,
    )


def _build(form: Form) -> nn.Module:
    config = config_class("bart", "BartConfig")(
        d_model=form.embed_dim, encoder_attention_heads=form.num_heads
    )
    built: nn.Module = attention_class("bart", "BartAttention")(
        form.embed_dim, form.num_heads, form.dropout,
        bias=bool(form.biases), config=config, layer_idx=0,
    )  # fmt: skip
    return built


BART = Source(
    kind="bart",
    title="transformers BartAttention",
    classes=frozenset({"transformers.models.bart.modeling_bart.BartAttention"}),
    tables=(tuple(entry for name in PROJECTIONS for entry in linear(name, name)),),
    read=_read,
    settle=lambda form, keys: form,
    build=_build,
    runner=run_with(
        mask="attention_mask",
        memory="key_value_states",
        cached=lambda module: True,
        cached_memory=lambda module: True,
    ),
    not_compared=NOT_COMPARED,
)
