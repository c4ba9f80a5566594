"""Extra keys: a learned key and value of the module's own, and a key and value of zeros.

Every query sees them, whatever is hidden from it, and they have no position. They are not joined to
the tokens' keys: a softmax over both gives the tokens the share ``exp(lse)``, with ``lse`` their
log-sum-exp, and an extra key ``exp(score)``. So masks, biases, caches and kernels know nothing of
them. Learned: ``add_bias_kv`` of ``torch.nn.MultiheadAttention`` and of fairseq; zeros: their
``add_zero_attn``.

Shapes: B batch, H heads, G key heads, T target length, S source length, X extra keys, D head
dimension.
"""

import dataclasses
import functools
from typing import NamedTuple

import torch
from torch import Tensor

from zeta.biases import Bias, Softcap, summands
from zeta.nn.anchors import Blocks
from zeta.ops.attention import run, run_weights
from zeta.ops.call import AttentionCall
from zeta.ops.deferred import Compute
from zeta.ops.dropout import keep_mask
from zeta.ops.parts import Indivisible, heads_of
from zeta.ops.sinks import mean_over_heads

_POSITION = -1
"""By which dropout draws for the learned key: negative, so that no token's key has it."""


class ExtraKeys(NamedTuple):
    """The extra keys of one call, the learned one before the zeros.

    Attributes:
        query: ``(B, H, T, D)``, not rotated.
        bias_k, bias_v: ``(1, 1, G * D)``, or None.
        zeros: Whether there is a key of zeros.
        blocks: How the tokens' keys are anchored, where it is in blocks.
    """

    query: Tensor
    bias_k: Tensor | None
    bias_v: Tensor | None
    zeros: bool
    blocks: Blocks | None = None

    def beside(self, blocks: Blocks | None) -> "ExtraKeys":
        """These beside tokens' keys that are anchored so."""
        return self if blocks is None else self._replace(blocks=blocks)

    def run(self, call: AttentionCall) -> Tensor:
        """``(B, H, T, D)``: the attention of a call to its own keys and to these."""
        out_BHTD, lse_BHT = _with_lse(call, self.blocks)
        scores_BHTX = _scores(call, self.query, self.bias_k, zeros=self.zeros)
        share_BHTX = _shares(lse_BHT, scores_BHTX)
        total_BHTD = out_BHTD * share_BHTX[..., :1]
        if self.bias_v is not None:
            weight_BHT1 = share_BHTX[..., 1:2]
            if call.dropout_p:
                kept = _keep_mask(call)
                weight_BHT1 = torch.where(kept, weight_BHT1 / (1.0 - call.dropout_p), 0.0)
            value_HD = _of_heads(self.bias_v, call).to(share_BHTX.dtype)
            total_BHTD = total_BHTD + weight_BHT1 * value_HD[:, None]
        return total_BHTD.to(out_BHTD.dtype)

    def weights(self, call: AttentionCall) -> tuple[AttentionCall, Compute]:
        """A call with as many keys as its weights have columns, and what makes them.

        Args:
            call: Of the tokens' keys, without dropout. Its ``result`` asks for weights.

        Returns:
            A call for `lazy_weights`, to be read by what comes with it and by nothing else, since
            its key is a stand-in; and what makes ``(B, H, T, S + X)`` or ``(B, T, S + X)`` of it.
        """
        learned = () if self.bias_k is None else (self.bias_k,)
        bias = () if call.bias is None else (call.bias,)
        split = _Split(call.key, self.query, learned, bias)
        columns = call.source + len(learned) + self.zeros
        sizes = (call.batch, call.key_heads, columns, call.head_dim)
        key = call.query.new_zeros(()).expand(sizes)
        compute = functools.partial(_weights, self.blocks, self.zeros)
        return dataclasses.replace(call, key=key, value=key, bias=split), compute


@dataclasses.dataclass(frozen=True, eq=False)
class _Split(Bias):
    """What the weights of a call with extra keys are made from, where autograd can find it.

    It takes the place of the call's bias, and no backend sees it.
    """

    key: Tensor
    query: Tensor
    learned: tuple[Tensor, ...]
    bias: tuple[Bias, ...]


def _weights(blocks: Blocks | None, zeros: bool, call: AttentionCall) -> Tensor:
    split = call.bias
    assert isinstance(split, _Split)
    bias = split.bias[0] if split.bias else None
    bias_k = split.learned[0] if split.learned else None
    own = dataclasses.replace(call, key=split.key, value=split.key, bias=bias, result="weights")
    scores_BHTX = _scores(own, split.query, bias_k, zeros=zeros)
    if call.result == "mean_weights":
        return _mean(own, scores_BHTX, blocks)
    return _joined(own, scores_BHTX, blocks)


def _joined(call: AttentionCall, scores_BHTX: Tensor, blocks: Blocks | None) -> Tensor:
    """``(B, H, T, S + X)``: the weights of the tokens' keys, then those of the extra ones."""
    weights_BHTS = run_weights(call) if blocks is None else blocks.weights(call)
    share_BHTX = _shares(_with_lse(call, blocks)[1], scores_BHTX)
    tokens_BHTS = weights_BHTS * share_BHTX[..., :1]
    return torch.cat((tokens_BHTS, share_BHTX[..., 1:]), -1).to(weights_BHTS.dtype)


def _mean(call: AttentionCall, scores_BHTX: Tensor, blocks: Blocks | None) -> Tensor:
    """Over the heads, one after the other; they are never held together."""

    def of_head(head: int) -> Tensor:
        heads = slice(head, head + 1)
        return _joined(heads_of(call, heads), scores_BHTX[:, heads], blocks)

    try:
        return mean_over_heads(call, call.source + scores_BHTX.shape[-1], of_head)
    except Indivisible:
        return _joined(call, scores_BHTX, blocks).mean(1)


def _with_lse(call: AttentionCall, blocks: Blocks | None) -> tuple[Tensor, Tensor]:
    call = dataclasses.replace(call, result="lse")
    out_BHTD, lse_BHT = run(call) if blocks is None else blocks.run_with_lse(call)
    assert lse_BHT is not None
    return out_BHTD, lse_BHT


def _scores(
    call: AttentionCall, query_BHTD: Tensor, bias_k: Tensor | None, *, zeros: bool
) -> Tensor:
    """``(B, H, T, X)``: how the queries meet the extra keys, in the dtype of scores.

    A mask or a bias says something about tokens, and leaves them alone; a softcap does not.
    """
    scores = []
    if bias_k is not None:
        # Not a product of matrices, which autocast would round.
        key_HD = _of_heads(bias_k, call).to(call.wide_dtype)
        product_BHT = (query_BHTD.to(call.wide_dtype) * key_HD[:, None]).sum(-1)
        scores.append(product_BHT * call.scale)
    if zeros:
        scores.append(query_BHTD.new_zeros(query_BHTD.shape[:3], dtype=call.wide_dtype))
    scores_BHTX = torch.stack(scores, -1)
    for bias in summands(call.bias):
        if isinstance(bias, Softcap):
            scores_BHTX = bias.apply(scores_BHTX, call.tile())
    return scores_BHTX


def _shares(lse_BHT: Tensor, scores_BHTX: Tensor) -> Tensor:
    """``(B, H, T, 1 + X)``: what a row's softmax gives all tokens, then each extra key."""
    # -inf for a row without tokens makes no NaN: an extra key's score is finite.
    return torch.cat((lse_BHT.unsqueeze(-1), scores_BHTX), -1).softmax(-1)


def _keep_mask(call: AttentionCall) -> Tensor:
    """Whether each query keeps the learned key's weight: bool, ``(B, H, T, 1)``."""
    tile = call.tile(columns=slice(0, 1))
    position = torch.full_like(tile.key_position[:1], _POSITION)
    return keep_mask(call, dataclasses.replace(tile, key_position=position))


def _of_heads(parameter: Tensor, call: AttentionCall) -> Tensor:
    """``(H, D)`` of ``(1, 1, G * D)``: each query head has that of its key head."""
    parameter_GD = parameter.view(call.key_heads, -1)
    return parameter_GD.repeat_interleave(call.heads // call.key_heads, 0)
