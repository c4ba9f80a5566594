"""The passes as operators of ``torch.library``: what torch.compile, export and autograd see.

An operator cannot take a dataclass: everything without a gradient comes as one list of tensors, in
the order of `Lowered.fixed`, and plain numbers.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zeta.ops.backends.triton import gradients, passes
from zeta.ops.backends.triton.arguments import Fixed, hashes_of, statistics_shape
from zeta.ops.buffers import empty_contiguous, empty_rows, rows
from zeta.ops.registration import operator
from zeta.standin import PLAIN
from zeta.transforms import of_each_gradient


@operator("triton_attention")
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor | None,
    dense: Tensor | None,
    tensors: Sequence[Tensor | None],
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    softcap_first: bool,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output ``(B, H, T, Dv)``, lse ``(B, H, T)`` in float32, and what backward reads."""
    fixed = Fixed(tensors, scale, causal, window, softcap, softcap_first, dropout_p)
    return passes.forward(query, key, value, offsets, dense, fixed)


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return (
        empty_rows(rows(query), value.shape[-1]),
        query.new_empty(query.shape[:3], dtype=torch.float32),
        query.new_empty(statistics_shape(query), dtype=torch.float32),
    )


@operator("triton_attention_backward")
def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    statistics: Tensor,
    offsets: Tensor | None,
    dense: Tensor | None,
    tensors: Sequence[Tensor | None],
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    softcap_first: bool,
    dropout_p: float,
    needs_offsets: bool,
    needs_dense: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, offsets, dense; an empty one for those not needed."""
    fixed = Fixed(tensors, scale, causal, window, softcap, softcap_first, dropout_p)
    given = gradients.of_output(
        dout, dlse, (query, key, value, out, statistics), offsets, dense, fixed
    )
    dquery, dkey, dvalue, doffsets, ddense = gradients.gradients(
        given, dense, needs_offsets, needs_dense
    )
    return dquery, dkey, dvalue, _or_empty(doffsets, query), _or_empty(ddense, query)


@attention_backward.register_fake
def _(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    statistics: Tensor,
    offsets: Tensor | None,
    dense: Tensor | None,
    *fixed: Any,
) -> tuple[Tensor, ...]:
    *_, needs_offsets, needs_dense = fixed
    return (
        *(empty_rows(rows(tensor), tensor.shape[-1]) for tensor in (query, key, value)),
        empty_contiguous(offsets if needs_offsets else None, statistics),
        empty_contiguous(dense if needs_dense else None, statistics),
    )


def _or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.float32) if tensor is None else tensor


def _save_attention(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    query, key, value, offsets, dense, tensors, *numbers = inputs
    out, _, statistics = output
    ctx.save_for_backward(query, key, value, out, statistics, offsets, dense, *tensors)
    ctx.numbers = numbers
    ctx.set_materialize_grads(False)


def _attention_gradient(
    ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: Tensor | None
) -> tuple[Any, ...]:
    query, key, value, out, statistics, offsets, dense, *tensors = ctx.saved_tensors
    needs_offsets, needs_dense = ctx.needs_input_grad[3:5]
    if dout is None:
        dout = torch.zeros_like(out)
    dquery, dkey, dvalue, doffsets, ddense = attention_backward(
        dout, dlse, query, key, value, out, statistics, offsets, dense, tensors, *ctx.numbers,
        needs_offsets, needs_dense,
    )  # fmt: skip
    return (
        dquery, dkey, dvalue, doffsets if needs_offsets else None,
        ddense if needs_dense else None, None, *[None] * len(ctx.numbers),
    )  # fmt: skip


attention.register_autograd(_attention_gradient, setup_context=_save_attention)


@operator("triton_weights")
def weights(
    query: Tensor,
    key: Tensor,
    offsets: Tensor | None,
    dense: Tensor | None,
    mean: bool,
    tensors: Sequence[Tensor | None],
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    softcap_first: bool,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Weights ``(B, H, T, S)`` or their mean ``(B, T, S)``; and what backward reads."""
    fixed = Fixed(tensors, scale, causal, window, softcap, softcap_first, 0.0)
    return passes.weights(query, key, offsets, dense, mean, fixed)


@weights.register_fake
def _(
    query: Tensor, key: Tensor, offsets: Tensor | None, dense: Tensor | None, mean: bool, *_: Any
) -> tuple[Tensor, Tensor]:
    batch, heads, queries = query.shape[:3]
    planes = (batch,) if mean else (batch, heads)
    return (
        query.new_empty((*planes, queries, key.shape[2])),
        query.new_empty(statistics_shape(query), dtype=torch.float32),
    )


@operator("triton_weights_backward")
def weights_backward(
    dweights: Tensor,
    query: Tensor,
    key: Tensor,
    statistics: Tensor,
    offsets: Tensor | None,
    dense: Tensor | None,
    tensors: Sequence[Tensor | None],
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    softcap_first: bool,
    dropout_p: float,
    needs_offsets: bool,
    needs_dense: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, offsets, dense; an empty one for those not needed."""
    fixed = Fixed(tensors, scale, causal, window, softcap, softcap_first, 0.0)
    given = gradients.of_weights(dweights, query, key, statistics, offsets, dense, fixed)
    dquery, dkey, _, doffsets, ddense = gradients.gradients(
        given, dense, needs_offsets, needs_dense
    )
    return dquery, dkey, _or_empty(doffsets, query), _or_empty(ddense, query)


@weights_backward.register_fake
def _(
    dweights: Tensor,
    query: Tensor,
    key: Tensor,
    statistics: Tensor,
    offsets: Tensor | None,
    dense: Tensor | None,
    *fixed: Any,
) -> tuple[Tensor, ...]:
    *_, needs_offsets, needs_dense = fixed
    return (
        *(empty_rows(rows(tensor), tensor.shape[-1]) for tensor in (query, key)),
        empty_contiguous(offsets if needs_offsets else None, statistics),
        empty_contiguous(dense if needs_dense else None, statistics),
    )


def _save_weights(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, offsets, dense, _, tensors, *numbers = inputs
    ctx.save_for_backward(query, key, output[1], offsets, dense, *tensors)
    ctx.numbers = numbers
    ctx.set_materialize_grads(False)


def _weights_gradient(ctx: Any, dweights: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    query, key, statistics, offsets, dense, *tensors = ctx.saved_tensors
    nothing = [None] * len(ctx.numbers)
    if dweights is None:
        return None, None, None, None, None, None, *nothing
    needs_offsets, needs_dense = ctx.needs_input_grad[2:4]
    dquery, dkey, doffsets, ddense = weights_backward(
        dweights, query, key, statistics, offsets, dense, tensors, *ctx.numbers, needs_offsets,
        needs_dense,
    )  # fmt: skip
    return (
        dquery, dkey, doffsets if needs_offsets else None, ddense if needs_dense else None, None,
        None, *nothing,
    )  # fmt: skip


weights.register_autograd(_weights_gradient, setup_context=_save_weights)


class EagerAttention(torch.autograd.Function):
    """`attention` without the operator's cost, a third of a millisecond: for eager code."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        query, key, value, offsets, dense, *numbers = inputs
        fixed = Fixed(*numbers)
        # Made once, for the backward pass too.
        ctx.hashes = fixed.hashes = hashes_of(query, key, fixed)
        output = passes.forward(query, key, value, offsets, dense, fixed)
        _save_attention(ctx, inputs, output)
        return output[:2]

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            # The operator, for it says so if somebody differentiates again.
            return _attention_gradient(ctx, dout, dlse, None)
        query, key, value, out, statistics, offsets, dense, *tensors = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        fixed = Fixed(tensors, *ctx.numbers)
        fixed.hashes = ctx.hashes
        inputs, needed = (query, key, value, out, statistics), ctx.needs_input_grad[3:5]

        def compute(dout: Tensor, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
            given = gradients.of_output(dout, dlse, inputs, offsets, dense, fixed)
            return gradients.gradients(given, dense, *needed)

        # Torch calls an operator for each of many, but nothing that is launched on the spot.
        return *of_each_gradient(compute, dout, dlse), *[None] * (len(ctx.numbers) + 1)


def is_eager(tensor: Tensor) -> bool:
    """Whether nothing traces what is computed, so that kernels may be launched on the spot."""
    return type(tensor) in PLAIN and not torch.compiler.is_compiling()
