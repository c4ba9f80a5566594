"""Biases of a block: added or applied to its scores, and their gradients gathered from those of the
scores.

Shape suffixes: B batch, H heads, R rows of the block (queries), C columns (keys).
"""

import torch
from torch import Tensor

from zeta.ops.backends.chunked.blocks import Block, Unit
from zeta.ops.call import AttentionCall
from zeta.values import cut


class Term:
    """One bias."""

    def apply(self, scores_BHRC: Tensor, block: Block, unit: Unit) -> Tensor | None:
        """Change scores in place; return what `backward` needs to be given back."""
        raise NotImplementedError

    def backward(self, grad_BHRC: Tensor, saved: Tensor | None, block: Block, unit: Unit) -> None:
        """Take the gradient of the changed scores, and make it that of the unchanged, in place."""
        raise NotImplementedError

    def gradient(self) -> Tensor | None:
        """Of the term's tensor, after all blocks; None if there is none or it was not asked for."""
        return None


class Softcap(Term):
    def __init__(self, limit: float) -> None:
        self._limit = limit

    def apply(self, scores_BHRC: Tensor, block: Block, unit: Unit) -> Tensor:
        tanh = (scores_BHRC / self._limit).tanh_()
        torch.mul(tanh, self._limit, out=scores_BHRC)
        return tanh

    def backward(self, grad_BHRC: Tensor, saved: Tensor | None, block: Block, unit: Unit) -> None:
        assert saved is not None
        grad_BHRC.mul_(saved.square_().neg_().add_(1.0))


class Dense(Term):
    """A tensor that broadcasts to the scores."""

    def __init__(self, tensor: Tensor, call: AttentionCall, needs_grad: bool) -> None:
        self._tensor = tensor
        self._grad = tensor.new_zeros(tensor.shape, dtype=call.wide_dtype) if needs_grad else None

    def apply(self, scores_BHRC: Tensor, block: Block, unit: Unit) -> None:
        part = _cut(self._tensor, block, unit)
        scores_BHRC.add_(part.to(scores_BHRC.dtype))

    def backward(self, grad_BHRC: Tensor, saved: Tensor | None, block: Block, unit: Unit) -> None:
        if self._grad is not None:
            part = _cut(self._grad, block, unit)
            part.add_(grad_BHRC.sum_to_size(part.shape))

    def gradient(self) -> Tensor | None:
        return self._grad


class Distance(Term):
    """A slope a head, times the distance of query and key."""

    def __init__(self, slopes_H: Tensor, call: AttentionCall, needs_grad: bool) -> None:
        self._slopes_H11 = slopes_H.to(call.wide_dtype)[:, None, None]
        self._call = call
        self._grad_H = torch.zeros_like(self._slopes_H11[:, 0, 0]) if needs_grad else None
        self._known: tuple[Block, int, Tensor] | None = None

    def _distance(self, block: Block, unit: Unit) -> Tensor:
        """``(1 or B, 1, R, C)``."""
        if self._known is None or self._known[:2] != (block, unit.batches.start):
            tile = self._call.tile(unit.batches, unit.heads, block.rows, block.columns)
            distance = (tile.key_position - tile.query_position).abs_().to(self._slopes_H11.dtype)
            self._known = (block, unit.batches.start, distance)
        return self._known[2]

    def apply(self, scores_BHRC: Tensor, block: Block, unit: Unit) -> None:
        slopes = self._slopes_H11[unit.heads]
        scores_BHRC.addcmul_(self._distance(block, unit), slopes, value=-1)

    def backward(self, grad_BHRC: Tensor, saved: Tensor | None, block: Block, unit: Unit) -> None:
        if self._grad_H is not None:
            weighted = grad_BHRC * self._distance(block, unit)
            self._grad_H[unit.heads].sub_(weighted.sum((0, 2, 3)))

    def gradient(self) -> Tensor | None:
        return self._grad_H


def _cut(tensor: Tensor, block: Block, unit: Unit) -> Tensor:
    return cut(tensor, (unit.batches, unit.heads, block.rows, block.columns))
