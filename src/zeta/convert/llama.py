"""Transformers' ``LlamaAttention`` and ``MistralAttention``: rotary positions, grouped key heads.

The rotation pairs features half a head apart. Mistral's attention also has a window.
"""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

from torch import nn

from zeta.convert.errors import ConversionError
from zeta.convert.forms import PROJECTIONS, WITHOUT_BIASES, Form, Rotary, scale_of
from zeta.convert.huggingface import (
    NOT_COMPARED,
    attention_class,
    config_class,
    rotary_tables,
    run_with,
)
from zeta.convert.rope import read_rotary, rope_options
from zeta.convert.source import Source
from zeta.convert.tables import Table, linear

_TABLE: Table = (
    *(entry for name in PROJECTIONS[:3] for entry in linear(name, name)),
    *linear("o_proj", "out_proj"),
)


def _read(module: Any) -> Form:
    heads = module.q_proj.out_features // module.head_dim
    return Form.plain(
        module.q_proj.in_features,
        heads,
        num_kv_heads=heads // module.num_key_value_groups,
        head_dim=module.head_dim,
        scale=scale_of(module.scaling, module.head_dim),
        dropout=module.attention_dropout,
        self_attention=True,
        rotary=read_rotary(module.config.rope_parameters),
    )


def _read_mistral(module: Any) -> Form:
    return dataclasses.replace(_read(module), window=module.config.sliding_window)


def _settle(form: Form, keys: Collection[str]) -> Form:
    return dataclasses.replace(form, self_attention=True, rotary=Rotary(interleaved=False))


def _builder(model: str, config_name: str, attention_name: str) -> Callable[[Form], nn.Module]:
    def build(form: Form) -> nn.Module:
        rotary = form.rotary
        if rotary is None or rotary.interleaved or rotary.rotary_dim is not None:
            raise ConversionError(
                f"{attention_name} needs position=RotaryEmbedding(head_dim, interleaved=False); "
                f"this attention has {rotary}"
            )
        options: dict[str, Any] = {"attention_bias": bool(form.biases)}
        if model == "mistral":
            options = {"sliding_window": form.window}
        config = config_class(model, config_name)(
            hidden_size=form.embed_dim,
            num_attention_heads=form.num_heads,
            num_key_value_heads=form.num_kv_heads,
            head_dim=form.head_dim,
            attention_dropout=form.dropout,
            **rope_options(rotary),
            **options,
        )
        built: nn.Module = attention_class(model, attention_name)(config, layer_idx=0)
        return built

    return build


_RUNNER = run_with(
    mask="attention_mask",
    memory=None,
    extra=rotary_tables,
    cached=lambda module: True,
    window=lambda module: getattr(module.config, "sliding_window", None),
)
_EXPRESSES = frozenset({"num_kv_heads", "head_dim", "position"})
_DROPPED = frozenset({"rotary_emb.inv_freq"})

LLAMA = Source(
    kind="llama",
    title="transformers LlamaAttention",
    classes=frozenset({"transformers.models.llama.modeling_llama.LlamaAttention"}),
    tables=(_TABLE,),
    read=_read,
    settle=_settle,
    build=_builder("llama", "LlamaConfig", "LlamaAttention"),
    runner=_RUNNER,
    tolerance=1e-5,
    expresses=_EXPRESSES,
    dropped=_DROPPED,
    not_compared=NOT_COMPARED,
)
MISTRAL = Source(
    kind="mistral",
    title="transformers MistralAttention",
    classes=frozenset({"transformers.models.mistral.modeling_mistral.MistralAttention"}),
    tables=(_TABLE,),
    read=_read_mistral,
    settle=_settle,
    build=_builder("mistral", "MistralConfig", "MistralAttention"),
    runner=_RUNNER,
    tolerance=1e-5,
    expresses=_EXPRESSES | {"window"},
    biases=(WITHOUT_BIASES,),
    dropped=_DROPPED,
    not_compared=NOT_COMPARED,
)
