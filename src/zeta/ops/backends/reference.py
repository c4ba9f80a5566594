"""The textbook: all scores at once, wide accumulators. The oracle of the tests, made to be read.

Shape suffixes: B batch, H heads, G key heads, T target length, S source length, D head dimension.
"""

import torch
from torch import Tensor

from zeta.biases import summands
from zeta.ops.call import AttentionCall, without_autocast
from zeta.ops.dropout import keep_mask

NAME = "reference"


def unsupported(call: AttentionCall) -> list[str]:
    """Nothing: the textbook can do everything, in memory for all scores."""
    return []


def run(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp.

    Returns:
        ``(B, H, T, Dv)`` in the query's dtype and ``(B, H, T)`` in the wide dtype.
    """
    with without_autocast(call.query.device):
        weights_BHTS, lse_BHT = _softmax(_scores(call))
        if call.dropout_p:
            kept = keep_mask(call, call.tile())
            weights_BHTS = torch.where(kept, weights_BHTS / (1.0 - call.dropout_p), 0.0)
        value_BHSD = _for_query_heads(call, _readable(call, call.value))
        return (weights_BHTS @ value_BHSD).to(call.query.dtype), lse_BHT


def weights(call: AttentionCall) -> Tensor:
    """Weights before dropout: ``(B, H, T, S)``, or ``(B, T, S)`` averaged over heads."""
    with without_autocast(call.query.device):
        weights_BHTS, _ = _softmax(_scores(call))
    if call.result == "mean_weights":
        weights_BHTS = weights_BHTS.mean(1)
    return weights_BHTS.to(call.query.dtype)


def _scores(call: AttentionCall) -> Tensor:
    """``(B, H, T, S)``: scaled, biased, and -inf where hidden."""
    query_BHTD = call.query.to(call.wide_dtype)
    key_BHSD = _for_query_heads(call, _readable(call, call.key))
    scores_BHTS = query_BHTD @ key_BHSD.mT * call.scale
    tile = call.tile()
    for bias in summands(call.bias):
        scores_BHTS = bias.apply(scores_BHTS, tile)
    visible = call.visible(tile)
    return scores_BHTS if visible is None else torch.where(visible, scores_BHTS, float("-inf"))


def _softmax(scores_BHTS: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over keys and its log-sum-exp; 0 and -inf for a row without a visible key."""
    # The maximum only keeps the exponentials finite; the result does not depend on it.
    maximum = scores_BHTS.detach().amax(-1, keepdim=True)
    maximum = torch.where(maximum == float("-inf"), 0.0, maximum)
    exponentials = (scores_BHTS - maximum).exp()
    total = exponentials.sum(-1, keepdim=True)
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    lse = torch.where(empty, float("-inf"), maximum + total.log())
    return exponentials / total, lse.squeeze(-1)


def _readable(call: AttentionCall, tensor_BGSD: Tensor) -> Tensor:
    """Keys or values, widened; 0 where no query may look, so that not even NaN leaks."""
    wide = tensor_BGSD.to(call.wide_dtype)
    visible = call.visible(call.tile())
    if visible is None:
        return wide
    seen_BHS = visible.expand(call.batch, call.heads, call.target, call.source).any(2)
    seen_BGS = seen_BHS.unflatten(1, (call.key_heads, -1)).any(2)
    return torch.where(seen_BGS.unsqueeze(-1), wide, 0.0)


def _for_query_heads(call: AttentionCall, tensor_BGSD: Tensor) -> Tensor:
    """Each key head repeated for the query heads that read it."""
    if call.key_heads == call.heads:
        return tensor_BGSD
    # Not `repeat_interleave`, which torch 2.11 does not export for every length.
    heads = torch.arange(call.heads, device=tensor_BGSD.device)
    return tensor_BGSD[:, heads // (call.heads // call.key_heads)]
