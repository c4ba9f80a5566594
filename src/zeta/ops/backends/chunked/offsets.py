"""Biases that depend on the offset of key and query alone: vectors, never a matrix of target by
source.

A block needs ``rows + columns - 1`` values of a head's vector, and beyond its reach only one on
each side. The gradient of the vector is the sums of the diagonals of that band.

Shape suffixes: B batch, H heads, R rows of the block (queries), C columns (keys), W columns within
reach, O offsets, N pairs.
"""

import torch
from torch import Tensor

from zeta.ops.backends.chunked.blocks import Block, Unit
from zeta.ops.backends.chunked.terms import Term
from zeta.ops.call import AttentionCall


class _Vector(Term):
    """A value for each head and offset; beyond its reach, the last."""

    def __init__(
        self, vector_HO: Tensor, reach: int, call: AttentionCall, needs_grad: bool
    ) -> None:
        self._vector_HO = vector_HO.to(call.wide_dtype)
        self._reach = reach
        self._call = call
        self._grad_HO = torch.zeros_like(self._vector_HO) if needs_grad else None
        self._known: tuple[Block, slice, Tensor] | None = None

    def gradient(self) -> Tensor | None:
        return self._grad_HO


class Offset(_Vector):
    """Of positions that are indices."""

    def _near(self, block: Block) -> tuple[slice, Tensor]:
        """The columns within reach of some row, and where their offsets lie in the vector."""
        if self._known is None or self._known[0] is not block:
            start, stop = block.columns.start, block.columns.stop
            shift = self._call.source - self._call.target
            first = block.rows.start + shift
            last = block.rows.stop - 1 + shift
            left = min(max(first - self._reach + 1, start), stop)
            right = max(min(last + self._reach, stop), left)
            device = self._vector_HO.device
            offset = torch.arange(left - last, max(right - first, left - last), device=device)
            index = offset.clamp_(-self._reach, self._reach).add_(self._reach)
            self._known = (block, slice(left - start, right - start), index)
        return self._known[1:]

    def apply(self, scores_BHRC: Tensor, block: Block, unit: Unit) -> None:
        near, index_O = self._near(block)
        vector_HO = self._vector_HO[unit.heads]
        if near.start > 0:
            scores_BHRC[..., : near.start].add_(vector_HO[:, 0, None, None])
        if near.stop < scores_BHRC.shape[-1]:
            scores_BHRC[..., near.stop :].add_(vector_HO[:, -1, None, None])
        if near.start < near.stop:
            band_HRW = vector_HO[:, index_O].unfold(-1, near.stop - near.start, 1).flip(-2)
            scores_BHRC[..., near].add_(band_HRW)

    def backward(self, grad_BHRC: Tensor, saved: Tensor | None, block: Block, unit: Unit) -> None:
        if self._grad_HO is None:
            return
        near, index_O = self._near(block)
        grad_HO = self._grad_HO[unit.heads]
        if near.start > 0:
            grad_HO[:, 0].add_(grad_BHRC[..., : near.start].sum((0, 2, 3)))
        if near.stop < grad_BHRC.shape[-1]:
            grad_HO[:, -1].add_(grad_BHRC[..., near.stop :].sum((0, 2, 3)))
        if near.start < near.stop:
            grad_HO.index_add_(1, index_O, sum_diagonals(grad_BHRC[..., near]).sum(0))


class OffsetByPosition(_Vector):
    """Of positions that are given, and may be any."""

    def _index(self, block: Block, unit: Unit) -> Tensor:
        """``(1 or B, R, C)``."""
        tile = self._call.tile(unit.batches, unit.heads, block.rows, block.columns)
        offset = (tile.key_position - tile.query_position)[:, 0]
        return offset.clamp_(-self._reach, self._reach).add_(self._reach)

    def apply(self, scores_BHRC: Tensor, block: Block, unit: Unit) -> None:
        values_HBRC = self._vector_HO[unit.heads][:, self._index(block, unit)]
        scores_BHRC.add_(values_HBRC.transpose(0, 1))

    def backward(self, grad_BHRC: Tensor, saved: Tensor | None, block: Block, unit: Unit) -> None:
        if self._grad_HO is None:
            return
        grad_HBRC = grad_BHRC.transpose(0, 1)
        index = self._index(block, unit).expand(grad_HBRC.shape[1:]).reshape(1, -1)
        grad_HN = grad_HBRC.reshape(grad_HBRC.shape[0], -1)
        self._grad_HO[unit.heads].scatter_add_(1, index.expand(grad_HN.shape), grad_HN)


def sum_diagonals(matrix_BHRW: Tensor) -> Tensor:
    """``(B, H, R + W - 1)``: sums over ``column - row``, from ``1 - R`` to ``W - 1``."""
    batch, heads, rows, width = matrix_BHRW.shape
    offsets = rows + width - 1
    # Rows that are followed and preceded by zeros turn diagonals into columns when read one element
    # wider.
    padded = matrix_BHRW.new_zeros(batch, heads, rows * (offsets + 1))
    spread = padded[..., : rows * offsets].unflatten(-1, (rows, offsets))
    spread[..., rows - 1 :].copy_(matrix_BHRW)
    return padded.view(batch, heads, rows, offsets + 1)[..., :offsets].sum(-2)
