"""The passes as operators of ``torch.library``, which torch.compile and export see.

An operator cannot take a tuple of many kinds: everything without a gradient comes as one list of
tensors, in the order of `Lowered.fixed`, and plain numbers.

The passes of attention have a second kernel each, in ``native/operators.cpp``, without Python. It
reads the arguments in their order here, and leaves to this one what is not plainly right for C.
"""

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from zeta.ops.backends.cpu import library, passes
from zeta.ops.backends.cpu.description import DTYPES, MAX_HEAD_DIM, Fixed
from zeta.ops.backends.cpu.passes import Gradients
from zeta.ops.buffers import empty_contiguous, empty_rows
from zeta.ops.functions import asked_twice
from zeta.ops.precision import float32_precision
from zeta.ops.registration import operator
from zeta.values import is_finite


@operator("cpu_attention")
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
    high: bool,
) -> tuple[Tensor, Tensor]:
    """The output ``(B, H, T, Dv)`` and lse ``(B, H, T)`` in float32."""
    fixed = Fixed(tensors, scale, causal, window, softcap, softcap_first, dropout_p, high)
    return passes.forward(query, key, value, offsets, dense, fixed)


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_rows(query, value.shape[-1]), _lse(query)


@operator("cpu_attention_backward")
def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: Tensor | None,
    dense: Tensor | None,
    tensors: Sequence[Tensor | None],
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    softcap_first: bool,
    dropout_p: float,
    high: bool,
    needs_offsets: bool,
    needs_dense: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, offsets, dense; an empty one for those not needed."""
    fixed = Fixed(tensors, scale, causal, window, softcap, softcap_first, dropout_p, high)
    inputs, needed = (query, key, value, out, lse), (needs_offsets, needs_dense)
    found = passes.backward(grad_out, grad_lse, inputs, offsets, dense, fixed, needed)
    assert found.value is not None
    return found.query, found.key, found.value, *_or_empty(found, lse)


@attention_backward.register_fake
def _(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: Tensor | None,
    dense: Tensor | None,
    *fixed: Any,
) -> tuple[Tensor, ...]:
    *_, needs_offsets, needs_dense = fixed
    return (
        *(empty_rows(tensor, tensor.shape[-1]) for tensor in (query, key, value)),
        empty_contiguous(offsets if needs_offsets else None, lse),
        empty_contiguous(dense if needs_dense else None, lse),
    )


@operator("cpu_weights")
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
    high: bool,
) -> tuple[Tensor, Tensor]:
    """Weights ``(B, H, T, S)`` or their mean ``(B, T, S)``; and lse."""
    fixed = Fixed(tensors, scale, causal, window, softcap, softcap_first, dropout_p, high)
    return passes.weights(query, key, offsets, dense, mean, fixed)


@weights.register_fake
def _(
    query: Tensor, key: Tensor, offsets: Tensor | None, dense: Tensor | None, mean: bool, *_: Any
) -> tuple[Tensor, Tensor]:
    batch, heads, target = query.shape[:3]
    planes = (batch,) if mean else (batch, heads)
    return query.new_empty((*planes, target, key.shape[2])), _lse(query)


@operator("cpu_weights_backward")
def weights_backward(
    grad_weights: Tensor,
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    offsets: Tensor | None,
    dense: Tensor | None,
    tensors: Sequence[Tensor | None],
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    softcap_first: bool,
    dropout_p: float,
    high: bool,
    needs_offsets: bool,
    needs_dense: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, offsets, dense; an empty one for those not needed."""
    fixed = Fixed(tensors, scale, causal, window, softcap, softcap_first, dropout_p, high)
    needed = (needs_offsets, needs_dense)
    found = passes.weights_backward(grad_weights, query, key, lse, offsets, dense, fixed, needed)
    return found.query, found.key, *_or_empty(found, lse)


@weights_backward.register_fake
def _(
    grad_weights: Tensor,
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    offsets: Tensor | None,
    dense: Tensor | None,
    *fixed: Any,
) -> tuple[Tensor, ...]:
    *_, needs_offsets, needs_dense = fixed
    return (
        *(empty_rows(tensor, tensor.shape[-1]) for tensor in (query, key)),
        empty_contiguous(offsets if needs_offsets else None, lse),
        empty_contiguous(dense if needs_dense else None, lse),
    )


def attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, causal: bool
) -> Tensor | None:
    """Attention ``(B, H, T, D)`` of what most calls are, inside of `torch.compile`: in every run, a
    compiled function looks at all that its compiler went through, which here is little.

    Returns:
        None where the call must be checked and described.
    """
    if not type(query) is type(key) is type(value) is Tensor or torch.is_autocast_enabled("cpu"):
        return None
    if not key.is_cpu or not value.is_cpu:
        return None
    if not key.dtype == value.dtype == query.dtype or query.dtype not in DTYPES:
        return None
    if not query.dim() == key.dim() == 4 or key.shape != value.shape or 0 in query.shape:
        return None
    batch, heads, _, head_dim = query.shape
    key_batch, key_heads, source, key_dim = key.shape
    if key_batch != batch or key_dim != head_dim or key_heads == 0 or source == 0:
        return None
    if heads % key_heads or head_dim > MAX_HEAD_DIM or library.obstacle() is not None:
        return None
    if scale is not None and not is_finite(scale):
        return None
    scale = 1.0 / math.sqrt(head_dim) if scale is None else float(scale)
    is_high = query.dtype == torch.float32 and float32_precision() == "high"
    numbers = scale, causal, 0, 0.0, False, 0.0, is_high
    found: tuple[Tensor, Tensor] = attention.overload(query, key, value, None, None, [], *numbers)
    return found[0]


def _lse(query: Tensor) -> Tensor:
    return query.new_empty(query.shape[:3], dtype=torch.float32)


def _or_empty(found: Gradients, other: Tensor) -> tuple[Tensor, Tensor]:
    offsets, dense = found.offsets, found.dense
    return (
        other.new_empty(0) if offsets is None else offsets,
        other.new_empty(0) if dense is None else dense,
    )


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, offsets, dense, tensors, *numbers = inputs
    ctx.save_for_backward(query, key, value, *output, offsets, dense, *tensors)
    ctx.numbers = numbers
    ctx.set_materialize_grads(False)


def _attention_gradient(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
    query, key, value, out, lse, offsets, dense, *tensors = ctx.saved_tensors
    nothing = [None] * len(ctx.numbers)
    if grad_out is None and grad_lse is None:
        return None, None, None, None, None, None, *nothing
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    needs_offsets, needs_dense = ctx.needs_input_grad[3:5]
    *found, grad_offsets, grad_dense = attention_backward(
        grad_out, grad_lse, query, key, value, out, lse, offsets, dense, tensors, *ctx.numbers,
        needs_offsets, needs_dense,
    )  # fmt: skip
    return (
        *found, grad_offsets if needs_offsets else None, grad_dense if needs_dense else None,
        None, *nothing,
    )  # fmt: skip


def _save_weights(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, offsets, dense, _, tensors, *numbers = inputs
    ctx.save_for_backward(query, key, output[1], offsets, dense, *tensors)
    ctx.numbers = numbers
    ctx.set_materialize_grads(False)


def _weights_gradient(ctx: Any, grad_weights: Tensor | None, _: Tensor | None) -> Any:
    query, key, lse, offsets, dense, *tensors = ctx.saved_tensors
    nothing = [None] * len(ctx.numbers)
    if grad_weights is None:
        return None, None, None, None, None, None, *nothing
    needs_offsets, needs_dense = ctx.needs_input_grad[2:4]
    *found, grad_offsets, grad_dense = weights_backward(
        grad_weights, query, key, lse, offsets, dense, tensors, *ctx.numbers, needs_offsets,
        needs_dense,
    )  # fmt: skip
    return (
        *found, grad_offsets if needs_offsets else None, grad_dense if needs_dense else None,
        None, None, *nothing,
    )  # fmt: skip


def _refuse(ctx: Any, *gradients: Any) -> NoReturn:
    raise RuntimeError(asked_twice("cpu"))


attention.register_autograd(_attention_gradient, setup_context=_save_attention)
weights.register_autograd(_weights_gradient, setup_context=_save_weights)
attention_backward.register_autograd(_refuse)
weights_backward.register_autograd(_refuse)

for each in (attention, attention_backward):
    each.keep_python_kernel()
library.register_operators()
