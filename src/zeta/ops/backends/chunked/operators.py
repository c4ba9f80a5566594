"""The passes as ``torch.library`` operators: opaque to ``torch.compile``, with shapes and gradients
declared.

An operator takes tensors, numbers and text; everything but query, key, value and the tensors of
biases crosses as `Plan.pack` writes it.

Shape suffixes: B batch, H query heads, G key heads, T target length, S source length, D features.
"""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from zeta.ops.backends.chunked import passes
from zeta.ops.backends.chunked.backward import Incoming
from zeta.ops.backends.chunked.description import Plan
from zeta.ops.functions import asked_twice
from zeta.values import wide_dtype

_Context = Any
"""torch gives the contexts of operators no public type."""


@torch.library.custom_op("zeta::chunked_attention", mutates_args=())
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    biases: Sequence[Tensor],
    others: Sequence[Tensor],
    spec: str,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `passes.attention`."""
    return passes.attention(Plan.unpack(others, spec, scale, dropout_p), query, key, value, biases)


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    lse = query.new_empty(query.shape[:3], dtype=wide_dtype(query.dtype))
    return query.new_empty(*query.shape[:3], value.shape[3]), lse, _pairs(query)


@torch.library.custom_op("zeta::chunked_weights", mutates_args=())
def weights(
    query: Tensor,
    key: Tensor,
    biases: Sequence[Tensor],
    others: Sequence[Tensor],
    spec: str,
    scale: float,
    mean: bool,
) -> tuple[Tensor, Tensor]:
    """See `passes.weights`."""
    return passes.weights(Plan.unpack(others, spec, scale), query, key, biases, mean)


@weights.register_fake
def _(query: Tensor, key: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, heads, target, _ = query.shape
    mean = rest[-1]
    shape = (batch, target, key.shape[2]) if mean else (batch, heads, target, key.shape[2])
    return query.new_empty(shape), _pairs(query)


def _pairs(query: Tensor) -> Tensor:
    return query.new_empty(*query.shape[:3], 2, dtype=wide_dtype(query.dtype))


@torch.library.custom_op("zeta::chunked_gradients", mutates_args=())
def gradients(
    incoming: Sequence[Tensor],
    given: str,
    pairs: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    biases: Sequence[Tensor],
    others: Sequence[Tensor],
    needs_grad: Sequence[bool],
    spec: str,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """See `passes.gradients`; ``given`` names the fields of `Incoming` that ``incoming`` holds."""
    arrived = Incoming(**dict(zip(given.split(","), incoming, strict=True)))
    plan = Plan.unpack(others, spec, scale, dropout_p)
    return passes.gradients(plan, arrived, pairs, query, key, value, biases, needs_grad)


@gradients.register_fake
def _(
    incoming: Sequence[Tensor],
    given: str,
    pairs: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    biases: Sequence[Tensor],
    others: Sequence[Tensor],
    needs_grad: Sequence[bool],
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    marked = zip(biases, needs_grad, strict=True)
    of_biases = [tensor.new_empty(tensor.shape) for tensor, needed in marked if needed]
    grad_query, grad_key, grad_value = (t.new_empty(t.shape) for t in (query, key, value))
    return grad_query, grad_key, grad_value, of_biases


def _remember(
    ctx: _Context, operands: Sequence[Tensor], rest: Sequence[Any], pairs: Tensor
) -> None:
    biases, others, ctx.spec, ctx.scale = rest
    ctx.needs_grad = [tensor.requires_grad for tensor in biases]
    ctx.save_for_backward(pairs, *operands, *biases, *others)
    ctx.set_materialize_grads(False)


def _run_backward(
    ctx: _Context, incoming: dict[str, Tensor | None], num_operands: int
) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None], list[None]]:
    pairs, *saved = ctx.saved_tensors
    operands, tensors = saved[:num_operands], saved[num_operands:]
    if num_operands == 2:
        operands.append(operands[1])  # Weights have no value; nothing is made of it.
    biases, others = tensors[: len(ctx.needs_grad)], tensors[len(ctx.needs_grad) :]
    arrived = {name: grad for name, grad in incoming.items() if grad is not None}
    settings = (ctx.needs_grad, ctx.spec, ctx.scale, ctx.dropout_p)
    *found, of_biases = gradients(
        list(arrived.values()), ",".join(arrived), pairs, *operands, biases, others, *settings
    )
    rest = iter(of_biases)
    marked = [next(rest) if needed else None for needed in ctx.needs_grad]
    return *found, marked, [None] * len(others)


def _set_up_attention(ctx: _Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _remember(ctx, inputs[:3], inputs[3:7], output[2])
    ctx.dropout_p = inputs[7]


def _attention_backward(ctx: _Context, *grads: Tensor | None) -> tuple[Any, ...]:
    grad_out, grad_lse, _ = grads
    if grad_out is None and grad_lse is None:
        return (None,) * 8
    found = _run_backward(ctx, {"out": grad_out, "lse": grad_lse}, num_operands=3)
    return *found, None, None, None


def _set_up_weights(ctx: _Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _remember(ctx, inputs[:2], inputs[2:6], output[1])
    ctx.dropout_p = 0.0


def _weights_backward(ctx: _Context, *grads: Tensor | None) -> tuple[Any, ...]:
    if grads[0] is None:
        return (None,) * 7
    grad_query, grad_key, _, *rest = _run_backward(ctx, {"weights": grads[0]}, num_operands=2)
    return grad_query, grad_key, *rest, None, None, None


def _refuse(ctx: _Context, *grads: Any) -> NoReturn:
    raise RuntimeError(asked_twice("chunked"))


attention.register_autograd(_attention_backward, setup_context=_set_up_attention)
weights.register_autograd(_weights_backward, setup_context=_set_up_weights)
gradients.register_autograd(_refuse)
