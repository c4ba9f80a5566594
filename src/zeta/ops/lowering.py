"""Masks and biases as compiled kernels take them: flags, lengths, vectors, strided tensors.

Shape suffixes: B batch, H heads, T target length, S source length, R offsets.
"""

import functools
import operator
from typing import NamedTuple

import torch
from torch import Tensor

from zeta import biases, masks
from zeta.ops.call import AttentionCall
from zeta.ops.offsets import is_by_offset, is_learned, offset_vector
from zeta.transforms import is_watched
from zeta.values import means

MAX_REACH = 1 << 20
"""The longest offset vector worth making: beyond, a bias is no function of a bounded distance."""
LAST_POSITION = 2**30 - 1
"""On both sides of 0: kernels subtract positions in int32."""
_FAR = (
    f"kernels take positions from {-LAST_POSITION} to {LAST_POSITION}; for others use "
    "backend='chunked' or 'reference'"
)


class Lowered(NamedTuple):
    """A call's mask and bias, taken apart.

    Attributes:
        offsets: ``(H, 2 * reach + 1)`` float32, the sum of the offset biases; differentiable.
        dense: Four dimensions, broadcastable to the scores; differentiable.
        window, softcap: 0 for none.
        slopes_H and the other tensors: Without a gradient, None where the call has none.
    """

    offsets: Tensor | None = None
    dense: Tensor | None = None
    slopes_H: Tensor | None = None
    prefix_B: Tensor | None = None
    padding_B: Tensor | None = None
    document_rows_BT: Tensor | None = None
    document_columns_BS: Tensor | None = None
    keep: Tensor | None = None
    query_positions: Tensor | None = None
    key_positions: Tensor | None = None
    seed: Tensor | None = None
    scale: float = 1.0
    causal: bool = False
    window: int = 0
    softcap: float = 0.0
    softcap_first: bool = False
    dropout_p: float = 0.0

    def fixed(self) -> tuple[list[Tensor | None], float, bool, int, float, bool, float]:
        """Everything without a gradient, as the operators take it."""
        tensors = [
            self.slopes_H, self.prefix_B, self.padding_B, self.document_rows_BT,
            self.document_columns_BS, self.keep, self.query_positions, self.key_positions,
            self.seed,
        ]  # fmt: skip
        return (
            tensors, self.scale, self.causal, self.window, self.softcap, self.softcap_first,
            self.dropout_p,
        )  # fmt: skip


def refusals(call: AttentionCall) -> list[str]:
    """Why a mask, a bias or positions cannot be lowered."""
    reasons = _far_positions(call)
    if call.mask is None and call.bias is None:
        return reasons
    for mask in masks.conjuncts(call.mask):
        if mask.meaning not in _MASKS:
            reasons.append(f"it cannot apply the mask {type(mask).__name__}")
    terms = biases.summands(call.bias)
    for term in terms:
        if not (means(term, biases.Dense, biases.Softcap) or is_by_offset(term)):
            reasons.append(f"it cannot apply the bias {type(term).__name__}")
    caps = [place for place, term in enumerate(terms) if means(term, biases.Softcap)]
    if len(caps) > 1:
        reasons.append(f"it applies one soft cap; got {len(caps)}")
    elif caps and caps[0] not in (0, len(terms) - 1):
        reasons.append("its soft cap comes before or after everything that is added")
    return reasons + _refused_offsets(call, terms)


def _far_positions(call: AttentionCall) -> list[str]:
    reasons = []
    for positions in (call.query_positions, call.key_positions):
        if positions is None or not _is_known(positions):
            continue
        least, most = (int(end) for end in positions.aminmax())
        if most > LAST_POSITION:
            reasons.append(f"its positions go up to {LAST_POSITION}; got {most}")
        if least < -LAST_POSITION:
            reasons.append(f"its positions begin at {-LAST_POSITION}; got {least}")
    return reasons


def _is_known(positions: Tensor) -> bool:
    """Whether one may look at them: nothing traces them, and no device is waited for."""
    if torch.compiler.is_compiling() or is_watched():
        return False
    return type(positions) is Tensor and positions.is_cpu


def _refused_offsets(call: AttentionCall, terms: tuple[biases.Bias, ...]) -> list[str]:
    offsets = [term for term in terms if is_by_offset(term)]
    reasons = []
    if any(term.reach(_longest(call)) > MAX_REACH for term in offsets if _in_vector(term)):
        reasons.append("it needs an offset bias that ends within a bounded distance")
    if call.has_positions and any(is_learned(term) for term in offsets):
        reasons.append("it finds no gradient of an offset bias under explicit positions")
    return reasons


_MASKS = (
    masks.Causal, masks.SlidingWindow, masks.PrefixLM, masks.Documents, masks.Padding, masks.Dense,
)  # fmt: skip


def lower(call: AttentionCall) -> Lowered:
    """Takes a call's mask and bias apart; `refusals` must be empty."""
    causal = means(call.mask, masks.Causal)
    if call.bias is None and (causal or call.mask is None) and not call.has_positions:
        # Most calls, and those that are soon over.
        return Lowered(
            seed=call.seed, scale=float(call.scale), causal=causal, dropout_p=call.dropout_p
        )
    conjuncts = masks.conjuncts(call.mask)
    terms = biases.summands(call.bias)
    windows = [mask.size for mask in conjuncts if means(mask, masks.SlidingWindow)]
    caps = [place for place, term in enumerate(terms) if means(term, biases.Softcap)]
    cap = terms[caps[0]] if caps else None
    document_rows, document_columns = _documents(call, conjuncts)
    query_positions, key_positions = call.query_positions, call.key_positions
    if call.has_positions:
        _check_unknown_positions(call)
        tile = call.tile()
        query_positions = tile.query_position[:, 0, :, 0].to(torch.int32).contiguous()
        key_positions = tile.key_position[:, 0, 0, :].to(torch.int32).contiguous()
    return Lowered(
        offsets=_offset_vector(call, terms),
        dense=_dense(terms),
        slopes_H=_slopes(terms),
        # Two prefixes, or two paddings, hold where the shorter does.
        prefix_B=_least([mask.lengths for mask in conjuncts if means(mask, masks.PrefixLM)]),
        padding_B=_least([mask.lengths for mask in conjuncts if means(mask, masks.Padding)]),
        document_rows_BT=document_rows,
        document_columns_BS=document_columns,
        keep=_keep(conjuncts),
        query_positions=query_positions,
        key_positions=key_positions,
        seed=call.seed,
        scale=float(call.scale),
        causal=bool(windows) or any(means(mask, masks.Causal) for mask in conjuncts),
        window=min(windows) if windows else 0,
        softcap=cap.limit if means(cap, biases.Softcap) else 0.0,
        softcap_first=bool(caps) and caps[0] == 0,
        dropout_p=call.dropout_p,
    )


def _check_unknown_positions(call: AttentionCall) -> None:
    """Far ones that `refusals` could not see are an error when they are computed with."""
    given = (call.query_positions, call.key_positions)
    unknown = [each.flatten() for each in given if each is not None and not _is_known(each)]
    if unknown:
        positions = torch.cat(unknown)
        near = positions.clamp(-LAST_POSITION, LAST_POSITION) == positions
        torch._assert_async(near.all(), _FAR)


def _longest(call: AttentionCall) -> int:
    """The longest distance between a query and a key; unbounded where positions are given."""
    return 1 << 62 if call.has_positions else max(call.source, call.target)


def _in_vector(term: biases.Bias) -> bool:
    """Whether an offset bias is read from a vector: fixed ALiBi slopes are multiplied instead."""
    return is_by_offset(term) and not (means(term, biases.Alibi) and not is_learned(term))


def _offset_vector(call: AttentionCall, terms: tuple[biases.Bias, ...]) -> Tensor | None:
    vectors = [t for t in terms if is_by_offset(t) and _in_vector(t)]
    if not vectors:
        return None
    reach = max(1, *(term.reach(_longest(call)) for term in vectors))
    device = call.query.device
    return functools.reduce(
        operator.add, (offset_vector(t, reach, device).float() for t in vectors)
    )


def _slopes(terms: tuple[biases.Bias, ...]) -> Tensor | None:
    slopes = [
        term.slopes.detach().float()
        for term in terms
        if means(term, biases.Alibi) and not _in_vector(term)
    ]
    return functools.reduce(operator.add, slopes).contiguous() if slopes else None


def _dense(terms: tuple[biases.Bias, ...]) -> Tensor | None:
    tensors = [term.tensor for term in terms if means(term, biases.Dense)]
    if len(tensors) == 1 and tensors[0].dtype != torch.float64:
        return tensors[0]
    # Several are added up as the scores are to which they belong, not in a dtype of their own.
    wide = (tensor.float() for tensor in tensors)
    return functools.reduce(operator.add, wide) if tensors else None


def _keep(conjuncts: tuple[masks.Mask, ...]) -> Tensor | None:
    tensors = [mask.tensor for mask in conjuncts if means(mask, masks.Dense)]
    return functools.reduce(operator.and_, tensors).view(torch.uint8) if tensors else None


def _least(lengths: list[Tensor]) -> Tensor | None:
    return functools.reduce(torch.minimum, lengths).contiguous() if lengths else None


def _documents(
    call: AttentionCall, conjuncts: tuple[masks.Mask, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """The document of each query and of each key."""
    documents = [mask for mask in conjuncts if means(mask, masks.Documents)]
    if not documents:
        return None, None
    tile = call.tile()
    queries, keys = tile.query_position[:, 0, :, 0], tile.key_position[:, 0, 0, :]
    found = [(mask.at(queries), mask.at(keys)) for mask in documents]
    rows, columns = found[0]
    if len(found) > 1:
        joined = functools.reduce(_paired, (torch.cat(both, 1) for both in found))
        rows, columns = joined.split((call.target, call.source), 1)
    return rows.contiguous(), columns.contiguous()


def _paired(one_BN: Tensor, other_BN: Tensor) -> Tensor:
    """A number for each pair of numbers, which may be any: the same where both are."""
    return _rank(one_BN) * one_BN.shape[1] + _rank(other_BN)


def _rank(numbers_BN: Tensor) -> Tensor:
    """How many numbers of a row are less than each: from 0 to N - 1."""
    return torch.searchsorted(numbers_BN.sort(1).values, numbers_BN)
