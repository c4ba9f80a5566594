"""Transformers' ``T5Attention``: scores without a factor, heads of any width, no biases.

Its relative position bias, in the first layer of a stack, is no part of the attention here: it is a
`zeta.nn.RelativePositionBias`, given to each layer as ``rel_pos=``.
"""

import dataclasses
from typing import Any

from torch import nn

from zeta.convert.errors import ConversionError
from zeta.convert.forms import WITHOUT_BIASES, Form, scale_of
from zeta.convert.huggingface import NOT_COMPARED, attention_class, config_class, run_with
from zeta.convert.source import Source, qualified_name
from zeta.convert.tables import Table, linear
from zeta.nn import RelativePositionBias

BIAS = "relative_attention_bias.weight"
_CLASS = "transformers.models.t5.modeling_t5.T5Attention"
_TABLE: Table = (
    *linear("q", "q_proj"),
    *linear("k", "k_proj"),
    *linear("v", "v_proj"),
    *linear("o", "out_proj"),
)


def relative_position_bias(module: nn.Module) -> RelativePositionBias:
    """The position bias of a T5 attention as a module of Zeta's.

    Args:
        module: A ``T5Attention`` of Transformers with ``has_relative_attention_bias``; it stays as
            it is.

    Returns:
        What to give every attention of the stack as ``rel_pos=``. Unidirectional for a decoder.

    Raises:
        ConversionError: It is no such module, has no bias, or makes it by other means than a table.
    """
    name = qualified_name(type(module))
    if name != _CLASS or not has_bias(module):
        raise ConversionError(
            f"a relative position bias comes from a {_CLASS} that has one, as the first layer of a "
            f"stack does; got {name}"
        )
    source: Any = module
    table = source.relative_attention_bias
    if type(table).forward is not nn.Embedding.forward or "forward" in vars(table):
        raise ConversionError(
            f"relative_attention_bias of this {T5.title} is a {qualified_name(type(table))}, "
            "whose computation is not known"
        )
    weight = table.weight
    bias = RelativePositionBias(
        bidirectional=not source.is_decoder,
        num_buckets=source.relative_attention_num_buckets,
        max_distance=source.relative_attention_max_distance,
        n_heads=source.n_heads,
        device="meta",
    )
    bias.relative_attention_bias.weight = nn.Parameter(
        weight.detach().clone(), requires_grad=weight.requires_grad
    )
    return bias.train(source.training)


def has_bias(module: nn.Module) -> bool:
    """Whether a module is a T5 attention that computes the bias of its stack."""
    return bool(getattr(module, "has_relative_attention_bias", False))


def _read(module: Any) -> Form:
    return Form.plain(
        module.d_model,
        module.n_heads,
        head_dim=module.key_value_proj_dim,
        scale=scale_of(module.scaling, module.key_value_proj_dim),
        dropout=module.dropout,
        # The first layer of a stack: distances have a meaning within one sequence only.
        self_attention=has_bias(module),
    )


def _build(form: Form) -> nn.Module:
    config = config_class("t5", "T5Config")(
        d_model=form.embed_dim,
        d_kv=form.head_dim,
        num_heads=form.num_heads,
        dropout_rate=form.dropout,
    )
    built: nn.Module = attention_class("t5", "T5Attention")(config, layer_idx=0)
    return built


T5 = Source(
    kind="t5",
    title="transformers T5Attention",
    classes=frozenset({_CLASS}),
    tables=(_TABLE,),
    read=_read,
    settle=lambda form, keys: dataclasses.replace(form, scale=1.0),
    build=_build,
    runner=run_with(
        mask="mask",
        memory="key_value_states",
        cached=lambda module: True,
        cached_memory=lambda module: not has_bias(module),
    ),
    expresses=frozenset({"head_dim"}),
    biases=(WITHOUT_BIASES,),
    scale=1.0,
    apart=frozenset({BIAS}),
    not_compared=NOT_COMPARED,
)
