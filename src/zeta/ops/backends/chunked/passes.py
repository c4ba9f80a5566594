"""The passes of a `Plan`, as pure functions of tensors; what operators and autograd functions have in common.

Shape suffixes: B batch, H query heads, G key heads, T target length, S source length, D features.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zeta.ops.backends.chunked import forward
from zeta.ops.backends.chunked.backward import Incoming, backward
from zeta.ops.backends.chunked.description import Plan
from zeta.ops.backends.chunked.terms import Softcap

ONCE = "the backend 'chunked' differentiates once; for second derivatives use backend='reference'"


def _as_written(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Keeps autocast from narrowing the products inside."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def attention(
    plan: Plan, query: Tensor, key: Tensor, value: Tensor, biases: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Output ``(B, H, T, Dv)``, log-sum-exp ``(B, H, T)``, and the pairs of `forward.Normaliser`."""
    call = plan.call(query, key, value)
    with _as_written(query.device):
        out, normaliser = forward.attention(call, plan.terms(biases, call))
    return out, normaliser.lse_BHT, normaliser.pairs_BHT2


def weights(
    plan: Plan, query: Tensor, key: Tensor, biases: Sequence[Tensor], mean: bool
) -> tuple[Tensor, Tensor]:
    """Weights ``(B, H, T, S)``, or ``(B, T, S)`` averaged over heads, and the pairs."""
    call = plan.call(query, key, key)
    with _as_written(query.device):
        found, normaliser = forward.weights(call, plan.terms(biases, call), mean)
    return found, normaliser.pairs_BHT2


def gradients(
    plan: Plan,
    incoming: Incoming,
    pairs: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    biases: Sequence[Tensor],
    needs_grad: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Gradients of query, key, value, and of the tensors of biases that ``needs_grad`` marks."""
    call = plan.call(query, key, value)
    terms = plan.terms(biases, call, needs_grad)
    with _as_written(query.device):
        found = backward(call, terms, pairs, incoming)
    holders = [term for term in terms if not isinstance(term, Softcap)]
    of_biases = [
        grad.to(tensor.dtype)
        for grad, tensor in ((term.gradient(), t) for term, t in zip(holders, biases, strict=True))
        if grad is not None
    ]
    grad_value = torch.zeros_like(value) if found.value is None else found.value
    return found.query, found.key, grad_value, of_biases
