"""The forward passes: output and log-sum-exp, or weights, a block of rows at a time.

Shape suffixes: B batch, H query heads, G key heads, T target length, S source length, R rows of the
block (queries), C columns (keys), D features.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from zeta.ops.backends.chunked import products
from zeta.ops.backends.chunked.blocks import Block, Unit, blocks, units
from zeta.ops.backends.chunked.hiding import Dropout, Hiding, integer, readable
from zeta.ops.backends.chunked.terms import Term
from zeta.ops.call import AttentionCall

_LOG2_E = math.log2(math.e)


class Scores:
    """Makes the scores of blocks: scaled, biased, and -inf where hidden."""

    def __init__(self, call: AttentionCall, key_BGSD: Tensor, terms: Sequence[Term]) -> None:
        self._call = call
        self._key_BGSD = key_BGSD
        self._terms = terms
        self._hiding = Hiding(call)
        # Scaling the queries is the cheaper way, and exact by a power of two.
        exact = abs(math.frexp(call.scale)[0]) == 0.5
        self._before, self.after = (call.scale, 1.0) if exact else (1.0, call.scale)

    def query(self, block: Block, unit: Unit) -> Tensor:
        """``(B, H, R, D)``: the block's queries, wide, and scaled but for the factor ``after``."""
        query_BHRD = self._call.query[unit.batches, unit.heads, block.rows]
        return (query_BHRD.to(self._call.wide_dtype) * self._before).contiguous()

    def of(
        self, query_BHRD: Tensor, block: Block, unit: Unit
    ) -> tuple[Tensor, list[Tensor | None]]:
        """``(B, H, R, C)``, and what the terms saved for their backward."""
        key_BGCD = self._key_BGSD[unit.batches, unit.groups, block.columns]
        scores_BHRC = products.inner(query_BHRD, key_BGCD)
        if self.after != 1.0:
            scores_BHRC.mul_(self.after)
        saved = [term.apply(scores_BHRC, block, unit) for term in self._terms]
        self._hiding.apply(scores_BHRC, block, unit)
        return scores_BHRC, saved


def exponentials(scores_BHRC: Tensor, maximum_BHR1: Tensor) -> Tensor:
    """``exp(scores - maximum)``, in place."""
    # On the CPU exp2 is several times as fast as exp. Scaled after the subtraction, it is as exact.
    return scores_BHRC.sub_(maximum_BHR1).mul_(_LOG2_E).exp2_()


class Normaliser:
    """What turns scores into weights, a pair of numbers a row: the maximum, and one over the sum.

    Kept for the backward pass, instead of the log-sum-exp that says the same: weights made from
    that would carry its rounding.

    Attributes:
        pairs_BHT2: The numbers; of a row that sees nothing, 0 and 1.
        lse_BHT: The log-sum-exp; of such a row, -inf.
    """

    def __init__(self, call: AttentionCall) -> None:
        shape = (call.batch, call.heads, call.target)
        self.pairs_BHT2 = call.query.new_zeros(*shape, 2, dtype=call.wide_dtype)
        self.pairs_BHT2[..., 1] = 1.0
        self.lse_BHT = call.query.new_full(shape, float("-inf"), dtype=call.wide_dtype)

    def divide_later(self, scores_BHRC: Tensor, block: Block, unit: Unit) -> Tensor:
        """Turn scores into weights but for a factor a row, in place; return those factors."""
        maximum = scores_BHRC.amax(-1, keepdim=True)
        maximum.masked_fill_(maximum == float("-inf"), 0.0)
        exponentials(scores_BHRC, maximum)
        total = scores_BHRC.sum(-1, keepdim=True)
        rows = (unit.batches, unit.heads, block.rows)
        self.lse_BHT[rows] = total.log().add_(maximum)[..., 0]
        inverse = total.masked_fill_(total == 0, 1.0).reciprocal_()
        self.pairs_BHT2[rows] = torch.cat((maximum, inverse), -1)
        return inverse


def attention(call: AttentionCall, terms: Sequence[Term]) -> tuple[Tensor, Normaliser]:
    """Output ``(B, H, T, Dv)`` in the query's dtype."""
    key_BGSD, value_BGSD = readable(call, call.key, call.value)
    scores = Scores(call, key_BGSD, terms)
    value_BGDS = value_BGSD.mT.contiguous()
    dropout = Dropout(call) if call.dropout_p else None
    out_BHTD = call.query.new_zeros(call.batch, call.heads, call.target, value_BGSD.shape[-1])
    normaliser = Normaliser(call)
    for block in blocks(call):
        for unit in units(call, block):
            weights_BHRC, _ = scores.of(scores.query(block, unit), block, unit)
            factor = normaliser.divide_later(weights_BHRC, block, unit)
            if dropout is not None and dropout.active:
                bits = weights_BHRC.view(integer(weights_BHRC.dtype))
                bits.bitwise_and_(dropout.kept(block, unit, weights_BHRC.dtype))
            columns_BGDC = value_BGDS[unit.batches, unit.groups, :, block.columns]
            out_BHRD = products.combine(weights_BHRC, columns_BGDC)
            factor.div_(1.0 - call.dropout_p)
            out_BHTD[unit.batches, unit.heads, block.rows] = out_BHRD.mul_(factor)
    return out_BHTD, normaliser


def weights(call: AttentionCall, terms: Sequence[Term], mean: bool) -> tuple[Tensor, Normaliser]:
    """Weights after the softmax, ``(B, H, T, S)`` or their mean over heads ``(B, T, S)``."""
    (key_BGSD,) = readable(call, call.key)
    scores = Scores(call, key_BGSD, terms)
    shape = (call.batch, call.target, call.source)
    if mean:
        result = call.query.new_zeros(shape, dtype=call.wide_dtype)
    else:
        result = call.query.new_zeros(shape[0], call.heads, *shape[1:])
    normaliser = Normaliser(call)
    for block in blocks(call):
        for unit in units(call, block):
            weights_BHRC, _ = scores.of(scores.query(block, unit), block, unit)
            factor = normaliser.divide_later(weights_BHRC, block, unit)
            if not mean:
                part = result[unit.batches, unit.heads, block.rows, block.columns]
                part.copy_(weights_BHRC.mul_(factor))
                continue
            factor.div_(call.heads)
            part = result[unit.batches, block.rows, block.columns]
            if weights_BHRC.shape[1] == 1:
                part.addcmul_(weights_BHRC[:, 0], factor[:, 0])
            else:
                part.add_(weights_BHRC.mul_(factor).sum(1))
    return result.to(call.query.dtype), normaliser
