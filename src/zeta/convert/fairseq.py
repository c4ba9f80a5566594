"""fairseq's ``MultiheadAttention``: separate projections, or the packed one of old checkpoints."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from zeta.convert.errors import ConversionError
from zeta.convert.forms import PROJECTIONS, Form, scale_of
from zeta.convert.source import Example, Runner, Source, optional
from zeta.convert.tables import Table, linear
from zeta.convert.torch_nn import EXTRA_KEY, PACKED, TORCH

SEPARATE: Table = (
    *(entry for name in PROJECTIONS for entry in linear(name, name)),
    *EXTRA_KEY,
)

_ALL_HIDDEN = {"queries whose keys are all hidden": "fairseq gives NaN, Zeta 0"}
_LEARNED = {
    "decoding": "with add_bias_kv fairseq's cache has the learned key once more at each step"
}


def _read(module: Any) -> Form:
    for name, value in (
        ("xformers_att_config", getattr(module, "use_xformers", False)),
        ("beam_size", getattr(module, "beam_size", 1) != 1),
    ):
        if value:
            raise ConversionError(
                f"{name} cannot be converted: zeta.nn.MultiheadAttention has no such option"
            )
    return Form.plain(
        module.embed_dim,
        module.num_heads,
        kdim=getattr(module, "kdim", module.embed_dim),
        vdim=getattr(module, "vdim", module.embed_dim),
        scale=scale_of(getattr(module, "scaling", module.head_dim**-0.5), module.head_dim),
        dropout=module.dropout_module.p if hasattr(module, "dropout_module") else module.dropout,
        self_attention=getattr(module, "self_attention", False),
        encoder_decoder_attention=getattr(module, "encoder_decoder_attention", False),
        add_bias_kv=module.bias_k is not None,
        add_zero_attn=module.add_zero_attn,
    )


def _build(form: Form) -> nn.Module:
    library = optional("fairseq.modules.multihead_attention", "fairseq")
    built: nn.Module = library.MultiheadAttention(
        form.embed_dim,
        form.num_heads,
        kdim=form.kdim,
        vdim=form.vdim,
        dropout=form.dropout,
        bias=bool(form.biases),
        self_attention=form.self_attention,
        encoder_decoder_attention=form.encoder_decoder_attention,
        add_bias_kv=form.add_bias_kv,
        add_zero_attn=form.add_zero_attn,
    )
    return built


def _runner(module: Any) -> Runner:
    def call(example: Example) -> tuple[Tensor, Tensor | None]:
        query, key, value = (
            tensor.transpose(0, 1) for tensor in (example.query, example.key, example.value)
        )
        out, weights = module(
            query, key, value, key_padding_mask=example.padding,
            attn_mask=example.additive(with_padding=False),
        )  # fmt: skip
        return out.transpose(0, 1), weights

    def decode(x: Tensor) -> Tensor:
        state: dict[str, Any] = {}
        steps = [
            module(token, token, token, incremental_state=state)[0]
            for token in x.transpose(0, 1).split(1)
        ]
        return torch.cat(steps).transpose(0, 1)

    def decode_cross(x: Tensor, memory: Tensor) -> Tensor:
        state: dict[str, Any] = {}
        key = memory.transpose(0, 1)
        steps = [
            module(token, key, key, incremental_state=state, static_kv=True)[0]
            for token in x.transpose(0, 1).split(1)
        ]
        return torch.cat(steps).transpose(0, 1)

    cross = getattr(module, "encoder_decoder_attention", False)
    learned = module.bias_k is not None
    not_compared = {} if learned or module.add_zero_attn else _ALL_HIDDEN
    return Runner(
        call,
        None if cross or learned else decode,
        decode_cross if cross and not learned else None,
        separate_values=not cross,
        not_compared=_LEARNED if learned else not_compared,
    )


FAIRSEQ = Source(
    kind="fairseq",
    title="fairseq MultiheadAttention",
    classes=frozenset(
        {
            "fairseq.modules.multihead_attention.MultiheadAttention",
            "fairseq.modules.multihead_attention.MultiHeadAttention",
        }
    ),
    tables=(SEPARATE, PACKED),
    read=_read,
    settle=lambda form, keys: dataclasses.replace(
        form, self_attention=form.kdim == form.vdim == form.embed_dim
    ),
    build=_build,
    tolerance=1e-5,
    runner=_runner,
    expresses=frozenset({"kdim", "vdim", "add_bias_kv", "add_zero_attn"}),
    not_compared={
        "weights of each head": "fairseq averages them over heads, and so does the comparison",
    },
    stand_in=TORCH,
)
