"""The passes of a `Plan`, as pure functions of tensors; what operators and autograd functions have
in common.

Shape suffixes: B batch, H query heads, G key heads, T target length, S source length, D features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from zeta.ops.backends.chunked import forward
from zeta.ops.backends.chunked.backward import Incoming, backward
from zeta.ops.backends.chunked.description import Plan
from zeta.ops.backends.chunked.terms import Softcap
from zeta.ops.call import without_autocast

_MANY_SCORES = 2**17
_LARGEST_KEPT = 2**25 - 2**16
"""Just below glibc's DEFAULT_MMAP_THRESHOLD_MAX."""


def _reuse_memory(query: Tensor, key: Tensor) -> None:
    """Make glibc hand the memory of one block to the next.

    It returns freed memory to the system above a threshold that follows what is freed, and faulting
    pages in again costs up to a third of a pass. Allocating memory, untouched, and freeing it lifts
    the threshold to the highest that glibc takes.
    """
    if query.device.type == "cpu" and query.shape[2] * key.shape[2] >= _MANY_SCORES:
        torch.UntypedStorage(_LARGEST_KEPT)


def attention(
    plan: Plan, query: Tensor, key: Tensor, value: Tensor, biases: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Output ``(B, H, T, Dv)``, log-sum-exp ``(B, H, T)``, and pairs of `forward.Normaliser`."""
    call = plan.call(query, key, value)
    _reuse_memory(query, key)
    with without_autocast(query.device):
        out, normaliser = forward.attention(call, plan.terms(biases, call))
    return out, normaliser.lse_BHT, normaliser.pairs_BHT2


def weights(
    plan: Plan, query: Tensor, key: Tensor, biases: Sequence[Tensor], mean: bool
) -> tuple[Tensor, Tensor]:
    """Weights ``(B, H, T, S)``, or ``(B, T, S)`` averaged over heads, and the pairs."""
    call = plan.call(query, key, key)
    _reuse_memory(query, key)
    with without_autocast(query.device):
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
    _reuse_memory(query, key)
    with without_autocast(query.device):
        found = backward(call, terms, pairs, incoming)
    holders = [term for term in terms if not isinstance(term, Softcap)]
    of_biases = [
        grad.to(tensor.dtype).contiguous()  # As the operator's fake kernel announces it.
        for grad, tensor in ((term.gradient(), t) for term, t in zip(holders, biases, strict=True))
        if grad is not None
    ]
    grad_value = value.new_zeros(value.shape) if found.value is None else found.value
    return found.query, found.key, grad_value, of_biases
