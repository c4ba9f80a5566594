"""TorchScale's ``MultiheadAttention``, of release 0.3.0 and of the repository's head.

The keys are Zeta's, with and without multiway, sub-LayerNorm and xPos.
"""

import dataclasses
from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from zeta.convert.errors import ConversionError
from zeta.convert.forms import PROJECTIONS, WITH_BIASES, Form, scale_of, split_position_of
from zeta.convert.source import Example, Runner, Source, optional
from zeta.convert.tables import Entry, Table, linear

_MULTIWAY = (".A", ".B")


def table(ways: tuple[str, ...]) -> Table:
    """The table for the names of the ways, each with its dot; ``("",)`` without multiway."""
    return (
        *(entry for name in PROJECTIONS for entry in linear(name, name, ways=ways)),
        *linear("inner_attn_ln", "inner_attn_ln", optional=True, ways=ways),
        Entry("xpos.scale", ("xpos.scale",), optional=True),
    )


def read(module: Any) -> Form:
    """The form of a TorchScale module, or of one made after it."""
    multiway = hasattr(module.q_proj, "A")
    norm = module.inner_attn_ln
    if norm is not None and multiway:
        norm = norm.A
    return Form.plain(
        module.embed_dim,
        module.num_heads,
        scale=scale_of(module.scaling, module.head_dim),
        dropout=module.dropout_module.p,
        self_attention=module.self_attention,
        encoder_decoder_attention=getattr(module, "encoder_decoder_attention", False),
        subln=norm is not None,
        layernorm_eps=1e-5 if norm is None else norm.eps,
        xpos_scale_base=None if module.xpos is None else module.xpos.scale_base,
        num_ways=2 if multiway else 1,
        split_position=split_position_of(module),
    )


def _settle(form: Form, keys: Collection[str]) -> Form:
    own = form.subln or form.xpos_scale_base is not None
    return dataclasses.replace(form, self_attention=own, encoder_decoder_attention=not own)


def _build(form: Form) -> nn.Module:
    if form.num_ways > 2:
        raise ConversionError(f"multiway={form.num_ways}: TorchScale has two ways at most")
    args = SimpleNamespace(
        multiway=form.num_ways == 2,
        layernorm_eps=form.layernorm_eps,
        xpos_rel_pos=form.xpos_scale_base is not None,
        xpos_scale_base=form.xpos_scale_base or 512,
        flash_attention=False,
    )
    library = optional("torchscale.component.multihead_attention", "--no-deps torchscale")
    built: nn.Module = library.MultiheadAttention(
        args, form.embed_dim, form.num_heads, form.dropout, form.self_attention,
        # TorchScale knows two kinds of attention only; this flag changes nothing else there.
        not form.self_attention, form.subln,
    )  # fmt: skip
    return built


def runner(module: Any) -> Runner:
    """How a TorchScale module, or one made after it, is run."""
    args: Any = getattr(module, "args", None)
    if getattr(args, "flash_attention", False):
        # Another path to the same function, on CUDA devices only.
        args.flash_attention = False

    def call(example: Example) -> tuple[Tensor, Tensor | None]:
        result = module(
            example.query, example.key, example.value,
            key_padding_mask=example.padding, attn_mask=example.additive(with_padding=False),
            rel_pos=example.rel_pos,
        )  # fmt: skip
        # zetascale returns the output alone.
        out, weights = result if isinstance(result, tuple) else (result, None)
        if weights is not None and weights.dim() == 3:
            weights = weights.unflatten(0, (-1, module.num_heads)).transpose(0, 1)
        return out, weights

    def decode(x: Tensor) -> Tensor:
        state: dict[str, Any] = {}
        steps = []
        for token in x.split(1, dim=1):
            result = module(token, token, token, incremental_state=state)
            steps.append(result[0] if isinstance(result, tuple) else result)
        return torch.cat(steps, dim=1)

    self_attention = module.self_attention
    return Runner(call, decode if self_attention else None, separate_values=True, rel_pos=True)


NOT_COMPARED = {
    "bool attn_mask": "TorchScale adds True as 1.0; masks are given as numbers",
    "decoding in chunks": "TorchScale's positions of xPos are wrong for more than one new token",
    "queries whose keys are all hidden": "TorchScale gives NaN, Zeta 0",
}

TORCHSCALE = Source(
    kind="torchscale",
    title="torchscale MultiheadAttention",
    classes=frozenset({"torchscale.component.multihead_attention.MultiheadAttention"}),
    tables=(table(("",)), table(_MULTIWAY)),
    read=read,
    settle=_settle,
    build=_build,
    tolerance=1e-5,
    runner=runner,
    expresses=frozenset({"subln", "xpos_scale_base", "multiway"}),
    biases=(WITH_BIASES,),
    not_compared=NOT_COMPARED,
)
