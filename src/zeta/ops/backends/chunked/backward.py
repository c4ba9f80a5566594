"""The backward pass: weights are made again from what normalised them, a block of rows at a time.

Shape suffixes: B batch, H query heads, G key heads, T target length, S source length, R rows of the
block (queries), C columns (keys), D features.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from zeta.ops.backends.chunked import products
from zeta.ops.backends.chunked.blocks import Block, Unit, blocks, units
from zeta.ops.backends.chunked.forward import Scores, exponentials
from zeta.ops.backends.chunked.hiding import Dropout, integer, readable
from zeta.ops.backends.chunked.terms import Term
from zeta.ops.call import AttentionCall


@dataclasses.dataclass(frozen=True, slots=True)
class Incoming:
    """Gradients of the results; None where a result was not used.

    Attributes:
        out: ``(B, H, T, Dv)``.
        lse: ``(B, H, T)``.
        weights: ``(B, H, T, S)``; or ``(B, T, S)``, of their mean over heads.
    """

    out: Tensor | None = None
    lse: Tensor | None = None
    weights: Tensor | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Gradients:
    """Of the operands; of the biases, each term keeps its own."""

    query: Tensor
    key: Tensor
    value: Tensor | None


def backward(
    call: AttentionCall, terms: Sequence[Term], pairs_BHT2: Tensor, incoming: Incoming
) -> Gradients:
    """Gradients of query, key and value in their dtypes, and those of the terms in the terms.

    Args:
        call: The call.
        terms: Its biases.
        pairs_BHT2: From `forward.Normaliser`.
        incoming: Gradients of the results.
    """
    work = _Backward(call, terms, pairs_BHT2, incoming)
    for block in blocks(call):
        for unit in units(call, block):
            work.add(block, unit)
    return work.gradients()


class _Backward:
    def __init__(
        self, call: AttentionCall, terms: Sequence[Term], pairs_BHT2: Tensor, incoming: Incoming
    ) -> None:
        self._call = call
        self._terms = terms
        self._incoming = incoming
        self._maximum_BHT1, self._factor_BHT1 = pairs_BHT2.split(1, -1)
        if incoming.out is None:
            (key_BGSD,) = readable(call, call.key)
        else:
            key_BGSD, self._value_BGSD = readable(call, call.key, call.value)
            self._grad_value_BGDS = _zeros_transposed(self._value_BGSD)
        self._key_BGDS = key_BGSD.mT.contiguous()
        self._scores = Scores(call, key_BGSD, terms)
        self._grad_key_BGDS = _zeros_transposed(key_BGSD)
        self._grad_query_BHTD = torch.zeros_like(call.query, memory_format=torch.contiguous_format)
        self._dropout = Dropout(call) if call.dropout_p and incoming.out is not None else None

    def add(self, block: Block, unit: Unit) -> None:
        """Add what one unit of a block contributes to all gradients."""
        call = self._call
        heads = (unit.batches, unit.heads, block.rows)
        query_BHRD = self._scores.query(block, unit)
        weights_BHRC, saved = self._scores.of(query_BHRD, block, unit)
        exponentials(weights_BHRC, self._maximum_BHT1[heads]).mul_(self._factor_BHT1[heads])
        grad_BHRC = self._of_weights(weights_BHRC, block, unit)
        if grad_BHRC is None:
            grad_BHRC = torch.zeros_like(weights_BHRC)
        else:
            grad_BHRC = _softmax_backward(grad_BHRC, weights_BHRC)
        if self._incoming.lse is not None:
            grad_lse = self._incoming.lse[heads].to(call.wide_dtype)
            grad_BHRC.addcmul_(weights_BHRC, grad_lse.unsqueeze(-1))
        for term, its in zip(reversed(self._terms), reversed(saved), strict=True):
            term.backward(grad_BHRC, its, block, unit)
        keys = (unit.batches, unit.groups, slice(None), block.columns)
        grad_query_BHRD = products.combine(grad_BHRC, self._key_BGDS[keys])
        self._grad_query_BHTD[heads] = grad_query_BHRD.mul_(call.scale)
        groups = unit.groups.stop - unit.groups.start
        self._grad_key_BGDS[keys].add_(products.combine_rows(grad_BHRC, query_BHRD, groups))

    def _of_weights(self, weights_BHRC: Tensor, block: Block, unit: Unit) -> Tensor | None:
        """The gradient of the weights before dropout; that of the values is added on the way."""
        incoming, wide = self._incoming, self._call.wide_dtype
        if incoming.weights is not None:
            if incoming.weights.dim() == 3:
                part = incoming.weights[unit.batches, None, block.rows, block.columns]
                return (part.to(wide) / self._call.heads).expand(weights_BHRC.shape).contiguous()
            part = incoming.weights[unit.batches, unit.heads, block.rows, block.columns]
            # A copy, which may be written to.
            return part.to(wide, copy=True, memory_format=torch.contiguous_format)
        if incoming.out is None:
            return None
        grad_out_BHRD = incoming.out[unit.batches, unit.heads, block.rows].to(wide)
        grad_out_BHRD = (grad_out_BHRD / (1.0 - self._call.dropout_p)).contiguous()
        value_BGCD = self._value_BGSD[unit.batches, unit.groups, block.columns]
        grad_BHRC = products.inner(grad_out_BHRD, value_BGCD)
        dropped_BHRC = weights_BHRC
        if self._dropout is not None and self._dropout.active:
            kept = self._dropout.kept(block, unit, wide)
            bits = integer(wide)
            grad_BHRC.view(bits).bitwise_and_(kept)
            dropped_BHRC = kept.bitwise_and_(weights_BHRC.view(bits)).view(wide)
        keys = (unit.batches, unit.groups, slice(None), block.columns)
        groups = unit.groups.stop - unit.groups.start
        part = products.combine_rows(dropped_BHRC, grad_out_BHRD, groups)
        self._grad_value_BGDS[keys].add_(part)
        return grad_BHRC

    def gradients(self) -> Gradients:
        """After all blocks."""
        key = self._grad_key_BGDS.mul_(self._scores.after).mT.to(self._call.key.dtype)
        value = None
        if self._incoming.out is not None:
            value = self._grad_value_BGDS.mT.to(self._call.value.dtype).contiguous()
        return Gradients(self._grad_query_BHTD, key.contiguous(), value)


def _zeros_transposed(tensor_BGSD: Tensor) -> Tensor:
    batch, groups, source, width = tensor_BGSD.shape
    return tensor_BGSD.new_zeros(batch, groups, width, source)


def _softmax_backward(grad_BHRC: Tensor, weights_BHRC: Tensor) -> Tensor:
    """``weights * (grad - sum(grad * weights))``, over the rows; on the CPU in place."""
    if grad_BHRC.device.type != "cpu":
        return torch._softmax_backward_data(grad_BHRC, weights_BHRC, -1, grad_BHRC.dtype)
    into = torch.ops.aten._softmax_backward_data.out
    into(grad_BHRC, weights_BHRC, -1, grad_BHRC.dtype, grad_input=grad_BHRC)
    return grad_BHRC
