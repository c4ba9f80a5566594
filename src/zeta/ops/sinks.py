"""Attention sinks: a learned score a head that takes a share of the softmax and gives nothing back.

A sink stands in the denominator only. With ``lse`` the log-sum-exp of a row without it, what the
keys keep is ``exp(lse) / (exp(lse) + exp(sink)) = sigmoid(lse - sink)``; output and weights shrink
by that factor, and nothing else changes. So every backend has sinks, with their gradients, once it
returns its log-sum-exp. Xiao et al., 2024, https://arxiv.org/abs/2309.17453; as learned scores in
GPT-OSS, https://arxiv.org/abs/2508.10925.

Shape suffixes: B batch, H query heads, T target length, S source length, D head dimension.
"""

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from zeta.ops.call import AttentionCall
from zeta.ops.parts import Indivisible, heads_of
from zeta.ops.versions import versions_of, written_to
from zeta.transforms import is_traced


def without_sinks(call: AttentionCall) -> AttentionCall:
    """What a backend is asked in its place: the output with the log-sum-exp, or the weights."""
    result = "lse" if call.result == "output" else call.result
    return dataclasses.replace(call, sinks=None, result=result)


def attenuate(out_BHTD: Tensor, lse_BHT: Tensor, sinks_H: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of a call, from those of the call without its sinks."""
    least = torch.finfo(lse_BHT.dtype).min
    # Finite, so that a row without keys, or a head without a sink, makes no inf - inf.
    keys_BHT = lse_BHT.clamp(min=least)
    given_H1 = sinks_H.to(lse_BHT.dtype).unsqueeze(-1)
    sinks_H1 = given_H1.clamp(min=least)
    # The derivative of `sigmoid` is made from 1 - sigmoid, of which little is left at a small sink.
    kept_BHT = F.logsigmoid(keys_BHT - sinks_H1).exp()
    total_BHT = torch.logaddexp(keys_BHT, sinks_H1)
    # Scores may be as low as the least number, of which a sink of that would take a share.
    is_none_H1 = given_H1 == float("-inf")
    kept_BHT1 = torch.where(is_none_H1, 1.0, kept_BHT).unsqueeze(-1)
    total_BHT = torch.where(is_none_H1, lse_BHT, total_BHT)
    return (out_BHTD * kept_BHT1).to(out_BHTD.dtype), total_BHT


def attenuated_weights(
    call: AttentionCall,
    run: Callable[[AttentionCall], tuple[Tensor, Tensor | None]],
    weights: Callable[[AttentionCall], Tensor],
) -> Tensor:
    """The weights of a call with sinks.

    Args:
        call: Its ``result`` is ``"weights"`` or ``"mean_weights"``.
        run, weights: Of a backend, for calls without sinks.

    Returns:
        ``(B, H, T, S)``, or ``(B, T, S)`` averaged over heads, in the query's dtype.
    """
    if call.result == "mean_weights":
        return _mean(call, run, weights)
    plain = without_sinks(call)
    weights_BHTS = weights(plain)
    lse_BHT = run(dataclasses.replace(plain, value=call.key, result="lse"))[1]
    assert lse_BHT is not None
    assert call.sinks is not None
    return attenuate(weights_BHTS, lse_BHT, call.sinks)[0]


def _mean(
    call: AttentionCall,
    run: Callable[[AttentionCall], tuple[Tensor, Tensor | None]],
    weights: Callable[[AttentionCall], Tensor],
) -> Tensor:
    """Head by head, each with a factor of its own; the heads are never held together."""
    every = dataclasses.replace(call, result="weights")

    def of_head(head: int) -> Tensor:
        return attenuated_weights(heads_of(every, slice(head, head + 1)), run, weights)

    try:
        return mean_over_heads(call, call.source, of_head)
    except Indivisible:
        return attenuated_weights(every, run, weights).mean(1)


def mean_over_heads(call: AttentionCall, columns: int, of_head: Callable[[int], Tensor]) -> Tensor:
    """``(B, T, columns)``, the mean over query heads of ``of_head(h)``, ``(B, 1, T, columns)``.

    One head is held at a time, and made again for the gradient.

    Raises:
        Indivisible: The call cannot be cut into heads.
    """

    def wide(head: int) -> Tensor:
        return of_head(head).squeeze(1).to(call.wide_dtype)

    # A call that cannot be cut says so here: torch 2.11 does not leave a checkpoint that raises.
    heads_of(call, slice(0, 1))
    shape = (call.batch, call.target, columns)
    total_BTS = call.query.new_zeros(shape, dtype=call.wide_dtype)
    # Made again for the gradient, which would otherwise keep those of all heads.
    again = torch.is_grad_enabled() and not is_traced()
    unchanged = _unless_written_to(call.tensors(), wide) if again else wide
    for head in range(call.heads):
        if again:
            part = checkpoint(unchanged, head, use_reentrant=False, preserve_rng_state=False)
        else:
            part = wide(head)
        total_BTS = total_BTS + part
    return (total_BTS / call.heads).to(call.query.dtype)


def _unless_written_to(
    tensors: list[Tensor], function: Callable[[int], Tensor]
) -> Callable[[int], Tensor]:
    """The function, which is an error once one of these tensors was changed."""
    versions = versions_of(tensors)

    def checked(head: int) -> Tensor:
        if written_to(tensors, versions):
            raise RuntimeError(
                "the averaged attention weights cannot be differentiated: a tensor of their call "
                "has been changed in place since"
            )
        return function(head)

    return checked
