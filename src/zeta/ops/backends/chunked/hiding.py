"""Masks of a block, as bits: what they hide becomes -inf whatever it was, and its gradient zero.

Comparing and selecting with bool tensors is slow on the CPU, so masks are made into integers, all
ones where a pair is seen, and joined with the floating-point bits of the scores.

Shape suffixes: B batch, H query heads, G key heads, T target length, S source length, R rows of the
block (queries), C columns (keys), D features.
"""

import torch
from torch import Tensor

from zeta.masks import Causal, SlidingWindow, conjuncts
from zeta.ops.backends.chunked.blocks import Block, Unit
from zeta.ops.call import AttentionCall
from zeta.ops.dropout import row_and_column_hashes, threshold
from zeta.values import means

_Hidden = list[tuple[slice, Tensor, Tensor]]


def integer(dtype: torch.dtype) -> torch.dtype:
    """The integers as wide as a floating-point type."""
    return torch.int64 if dtype == torch.float64 else torch.int32


class Hiding:
    """Applies the mask of a call to its blocks; one block after the other."""

    def __init__(self, call: AttentionCall) -> None:
        self._call = call
        self._block: Block | None = None
        self._known: dict[tuple[int, int], _Hidden] = {}
        one = slice(0, 1)
        visible = call.visible(call.tile(rows=one, columns=one))
        self._by_batch = visible is not None and visible.shape[0] > 1
        self._by_head = visible is not None and visible.shape[1] > 1

    def apply(self, scores_BHRC: Tensor, block: Block, unit: Unit) -> None:
        """Write -inf, in place, to the scores of hidden pairs, NaN or not."""
        if not block.partial:
            return
        if block is not self._block:
            self._known.clear()
            self._block = block
        key = (
            unit.batches.start if self._by_batch else -1,
            unit.heads.start if self._by_head else -1,
        )
        bits_BHRC = scores_BHRC.view(integer(scores_BHRC.dtype))
        if key not in self._known:
            self._known.clear()
            self._known[key] = self._bits(block, unit, bits_BHRC.dtype)
        for columns, seen, filling in self._known[key]:
            bits_BHRC[..., columns].bitwise_and_(seen).bitwise_or_(filling)

    def _bits(self, block: Block, unit: Unit, dtype: torch.dtype) -> _Hidden:
        """For each partial range: ones where seen, and the bits of -inf where hidden."""
        minus_infinity = -(2**23) if dtype == torch.int32 else -(2**52)
        found = []
        for columns in block.partial:
            tile = self._call.tile(unit.batches, unit.heads, block.rows, columns)
            visible = self._call.visible(tile)
            if visible is None:
                continue
            seen = visible.to(dtype).neg_()
            within = slice(columns.start - block.columns.start, columns.stop - block.columns.start)
            found.append((within, seen, ~seen & minus_infinity))
        return found


class Dropout:
    """Which weights of a block the hash keeps, as bits; nothing where ``dropout_p`` is 0."""

    def __init__(self, call: AttentionCall) -> None:
        self._threshold = threshold(call.dropout_p)
        self.active = self._threshold > -(2**31)
        """Whether anything is ever dropped."""
        if self.active:
            self._rows_BHT1, self._columns_B11S = row_and_column_hashes(call, call.tile())

    def kept(self, block: Block, unit: Unit, dtype: torch.dtype) -> Tensor:
        """``(B, H, R, C)`` integers for weights of ``dtype``: all ones where kept, otherwise 0."""
        row = self._rows_BHT1[unit.batches, unit.heads, block.rows]
        by_batch = self._columns_B11S.shape[0] > 1
        column = self._columns_B11S[unit.batches if by_batch else slice(None), :, :, block.columns]
        mixed = row * column
        # A comparison by arithmetic: the clamp leaves threshold - 1 or threshold.
        least = self._threshold - 1
        mixed.clamp_(least, self._threshold).neg_().add_(least)
        return mixed.to(integer(dtype))


def readable(call: AttentionCall, *tensors_BGSD: Tensor) -> tuple[Tensor, ...]:
    """Keys and values, widened; 0 where no query of a head may look, so that not even NaN leaks."""
    wide = tuple(tensor.to(call.wide_dtype) for tensor in tensors_BGSD)
    if _all_seen(call) or (call.query.device.type == "cpu" and all(map(_is_finite, wide))):
        return wide
    seen_BGS1 = _seen(call).unsqueeze(-1)
    return tuple(torch.where(seen_BGS1, tensor, 0.0) for tensor in wide)


def _all_seen(call: AttentionCall) -> bool:
    """Whether every key inside the bounds of a block is seen by one of its rows."""
    if call.has_positions:
        return False
    return all(means(term, Causal, SlidingWindow) for term in conjuncts(call.mask))


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor.sum()))


def _seen(call: AttentionCall) -> Tensor:
    """``(B, G, S)``: the keys that some query of some head of the group may see."""
    shape = (call.batch, call.heads, call.source)
    seen_BHS = torch.zeros(shape, dtype=torch.bool, device=call.query.device)
    step = max(1, 2**22 // call.source)
    for first in range(0, call.target, step):
        visible = call.visible(call.tile(rows=slice(first, min(first + step, call.target))))
        if visible is None:
            return torch.ones_like(seen_BHS[:, : call.key_heads])
        seen_BHS |= visible.any(2)
    batch, heads, source = seen_BHS.shape
    return seen_BHS.view(batch, call.key_heads, heads // call.key_heads, source).any(2)
