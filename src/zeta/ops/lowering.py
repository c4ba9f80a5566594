"""Masks and biases as compiled kernels take them: flags, lengths, vectors, strided tensors.

Shape suffixes: B batch, H heads, T target length, S source length, R offsets.
"""

import functools
import operator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zeta import biases, masks
from zeta.ops.call import AttentionCall
from zeta.ops.transforms import is_watched
from zeta.positions import t5_buckets

MAX_REACH = 1 << 20
"""The longest offset vector worth making: beyond, a bias is no function of a bounded distance."""


MAX_KEPT_REACH = 1 << 13
"""The longest reach of a T5 bias whose buckets are kept: 128 kB."""


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


class Plain(NamedTuple):
    """`Lowered` for calls that are soon over: of each kind at most one, as it is.

    Attributes:
        causal, window, softcap, softcap_first, dropout_p: As in `Lowered`.
        drop_below, seed: Of the dropout; see `zeta.ops.dropout`.
        padding_B: Of `masks.Padding`.
        keep: Of `masks.Dense`, bool.
        offsets: As in `Lowered`; float32 and contiguous where they are not learned.
        slopes_H: Of `biases.Alibi`.
        dense: Of `biases.Dense`.
    """

    causal: bool = False
    window: int = 0
    softcap: float = 0.0
    softcap_first: bool = False
    dropout_p: float = 0.0
    drop_below: int = 0
    seed: int = 0
    padding_B: Tensor | None = None
    keep: Tensor | None = None
    offsets: Tensor | None = None
    slopes_H: Tensor | None = None
    dense: Tensor | None = None

    def lowered(self, scale: float) -> Lowered:
        """The same for calls that may take longer."""
        keep = None if self.keep is None else self.keep.view(torch.uint8)
        return Lowered(
            offsets=self.offsets, dense=self.dense, slopes_H=self.slopes_H,
            padding_B=self.padding_B, keep=keep, scale=scale, causal=self.causal,
            window=self.window, softcap=self.softcap, softcap_first=self.softcap_first,
            dropout_p=self.dropout_p, seed=torch.tensor(self.seed) if self.dropout_p else None,
        )  # fmt: skip


_PLAIN = Plain()
_CAUSAL = Plain(causal=True)


def plainly_lowered(
    mask: masks.Mask | None, bias: biases.Bias | None, longest: int
) -> Plain | None:
    """Takes mask and bias apart, looked at but not checked; None where `lower` has to.

    Args:
        mask, bias: Whatever was given as these.
        longest: The longest distance between a query and a key.
    """
    if mask is None:
        found = _PLAIN
    elif type(mask) is masks.Causal:
        found = _CAUSAL
    else:
        hidden = _plainly_hidden(mask)
        if hidden is None:
            return None
        causal, window, padding, keep = hidden
        found = Plain(causal=causal, window=window, padding_B=padding, keep=keep)
    if bias is None:
        return found
    added = _plainly_added(bias, longest)
    if added is None:
        return None
    softcap, softcap_first, offsets, slopes, dense = added
    return found._replace(
        softcap=softcap, softcap_first=softcap_first, offsets=offsets, slopes_H=slopes, dense=dense
    )


def _plainly_hidden(mask: masks.Mask) -> tuple[bool, int, Tensor | None, Tensor | None] | None:
    """``causal``, ``window``, ``padding_B``, ``keep`` of `Plain`."""
    causal, window, padding, keep = False, 0, None, None
    for term in masks.conjuncts(mask):
        if type(term) is masks.Causal:
            causal = True
        elif type(term) is masks.SlidingWindow and not window:
            causal, window = True, term.size
        elif type(term) is masks.Padding and padding is None:
            padding = term.lengths
        elif type(term) is masks.Dense and keep is None:
            keep = term.tensor
        else:
            return None
    return causal, window, padding, keep


def _plainly_added(
    bias: biases.Bias, longest: int
) -> tuple[float, bool, Tensor | None, Tensor | None, Tensor | None] | None:
    """``softcap``, ``softcap_first``, ``offsets``, ``slopes_H``, ``dense`` of `Plain`."""
    softcap, softcap_first, offsets, slopes, dense = 0.0, False, None, None, None
    terms = biases.summands(bias)
    for place, term in enumerate(terms):
        if type(term) is biases.Softcap and not softcap and place in (0, len(terms) - 1):
            softcap, softcap_first = float(term.limit), place == 0
        elif type(term) is biases.Dense and dense is None:
            dense = term.tensor
        elif type(term) is biases.Alibi and slopes is None and not _learned(term):
            slopes = term.slopes
        elif type(term) is biases.Bucketed and offsets is None and _has_kept_buckets(term):
            offsets = _plain_offsets(term, max(1, term.reach(longest)))
        else:
            return None
    return softcap, softcap_first, offsets, slopes, dense


def _plain_offsets(term: biases.Bucketed, reach: int) -> Tensor:
    if _learned(term):
        return _at_offsets(term, reach)
    # Less work than an embedding, but not so its gradient.
    return term.table.detach().T.index_select(1, _kept_buckets(term, reach)).float()


def refusals(call: AttentionCall) -> list[str]:
    """Why a mask or bias cannot be lowered."""
    if call.mask is None and call.bias is None:
        return []
    reasons = []
    for mask in masks.conjuncts(call.mask):
        if not isinstance(mask, _MASKS):
            reasons.append(f"it cannot apply the mask {type(mask).__name__}")
    terms = biases.summands(call.bias)
    for term in terms:
        if not isinstance(term, biases.Dense | biases.OffsetBias | biases.Softcap):
            reasons.append(f"it cannot apply the bias {type(term).__name__}")
    caps = [place for place, term in enumerate(terms) if isinstance(term, biases.Softcap)]
    if len(caps) > 1:
        reasons.append(f"it applies one soft cap; got {len(caps)}")
    elif caps and caps[0] not in (0, len(terms) - 1):
        reasons.append("its soft cap comes before or after everything that is added")
    return reasons + _refused_offsets(call, terms)


def _refused_offsets(call: AttentionCall, terms: tuple[biases.Bias, ...]) -> list[str]:
    offsets = [term for term in terms if isinstance(term, biases.OffsetBias)]
    reasons = []
    if any(term.reach(_longest(call)) > MAX_REACH for term in offsets if _in_vector(term)):
        reasons.append("it needs an offset bias that ends within a bounded distance")
    if _has_positions(call) and any(_learned(term) for term in offsets):
        reasons.append("it finds no gradient of an offset bias under explicit positions")
    return reasons


_MASKS = (
    masks.Causal, masks.SlidingWindow, masks.PrefixLM, masks.Documents, masks.Padding, masks.Dense,
)  # fmt: skip


def lower(call: AttentionCall) -> Lowered:
    """Takes a call's mask and bias apart; `refusals` must be empty."""
    causal = isinstance(call.mask, masks.Causal)
    if call.bias is None and (causal or call.mask is None) and not _has_positions(call):
        # Most calls, and those that are soon over.
        return Lowered(
            seed=call.seed, scale=float(call.scale), causal=causal, dropout_p=call.dropout_p
        )
    conjuncts = masks.conjuncts(call.mask)
    terms = biases.summands(call.bias)
    windows = [mask.size for mask in conjuncts if isinstance(mask, masks.SlidingWindow)]
    caps = [place for place, term in enumerate(terms) if isinstance(term, biases.Softcap)]
    cap = terms[caps[0]] if caps else None
    document_rows, document_columns = _documents(call, conjuncts)
    has_positions = _has_positions(call)
    query_positions, key_positions = call.query_positions, call.key_positions
    if has_positions:
        tile = call.tile()
        query_positions = tile.query_position[:, 0, :, 0].to(torch.int32).contiguous()
        key_positions = tile.key_position[:, 0, 0, :].to(torch.int32).contiguous()
    return Lowered(
        offsets=_offset_vector(call, terms),
        dense=_dense(terms),
        slopes_H=_slopes(terms),
        # Two prefixes, or two paddings, hold where the shorter does.
        prefix_B=_least([mask.lengths for mask in conjuncts if isinstance(mask, masks.PrefixLM)]),
        padding_B=_least([mask.lengths for mask in conjuncts if isinstance(mask, masks.Padding)]),
        document_rows_BT=document_rows,
        document_columns_BS=document_columns,
        keep=_keep(conjuncts),
        query_positions=query_positions,
        key_positions=key_positions,
        seed=call.seed,
        scale=float(call.scale),
        causal=bool(windows) or any(isinstance(mask, masks.Causal) for mask in conjuncts),
        window=min(windows, default=0),
        softcap=cap.limit if isinstance(cap, biases.Softcap) else 0.0,
        softcap_first=bool(caps) and caps[0] == 0,
        dropout_p=call.dropout_p,
    )


def _has_positions(call: AttentionCall) -> bool:
    return call.query_positions is not None or call.key_positions is not None


def _longest(call: AttentionCall) -> int:
    """The longest distance between a query and a key; unbounded where positions are given."""
    return 1 << 62 if _has_positions(call) else max(call.source, call.target)


def _learned(term: biases.Bias) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in term.flatten()[1])


def _in_vector(term: biases.Bias) -> bool:
    """Whether an offset bias is read from a vector: fixed ALiBi slopes are multiplied instead."""
    return isinstance(term, biases.OffsetBias) and not (
        isinstance(term, biases.Alibi) and not _learned(term)
    )


def _offset_vector(call: AttentionCall, terms: tuple[biases.Bias, ...]) -> Tensor | None:
    vectors = [t for t in terms if isinstance(t, biases.OffsetBias) and _in_vector(t)]
    if not vectors:
        return None
    reach = max(1, *(term.reach(_longest(call)) for term in vectors))
    return functools.reduce(operator.add, (_at_offsets(t, reach).float() for t in vectors))


def _at_offsets(term: biases.OffsetBias, reach: int) -> Tensor:
    """``term.offset_vector(reach)``, without finding T5's buckets each time."""
    if not isinstance(term, biases.Bucketed) or torch.compiler.is_compiling() or is_watched():
        return term.offset_vector(reach)
    if reach > term.max_distance or not _has_kept_buckets(term):
        return term.offset_vector(reach)
    return F.embedding(_kept_buckets(term, reach), term.table).T


def _has_kept_buckets(term: biases.Bucketed) -> bool:
    """Whether the buckets of a T5 bias are kept. While a CUDA graph is recorded they are found:
    what it reads must last as long as the graph does.
    """
    if term.max_distance > MAX_KEPT_REACH:
        return False
    table = term.table
    return table.is_cpu or (table.is_cuda and not torch.cuda.is_current_stream_capturing())


def _kept_buckets(term: biases.Bucketed, reach: int) -> Tensor:
    """Of offsets ``-reach .. reach``, no further than the bias's own reach."""
    table, middle = term.table, term.max_distance
    buckets_R = _buckets(term.bidirectional, table.shape[0], middle, table.device)
    return buckets_R[middle - reach : middle + reach + 1]


@functools.lru_cache(maxsize=64)
def _buckets(
    bidirectional: bool, num_buckets: int, max_distance: int, device: torch.device
) -> Tensor:
    """Buckets of offsets ``-max_distance .. max_distance``, which nobody changes."""
    # One made in inference mode could never take part in a gradient.
    with torch.inference_mode(False):
        buckets_R = t5_buckets(
            torch.arange(-max_distance, max_distance + 1, device="cpu"),
            bidirectional=bidirectional,
            num_buckets=num_buckets,
            max_distance=max_distance,
        )
        # The copy waits for the device: any stream may read it.
        return buckets_R.to(device)


def _slopes(terms: tuple[biases.Bias, ...]) -> Tensor | None:
    slopes = [
        term.slopes.detach().float()
        for term in terms
        if isinstance(term, biases.Alibi) and not _in_vector(term)
    ]
    return functools.reduce(operator.add, slopes).contiguous() if slopes else None


def _dense(terms: tuple[biases.Bias, ...]) -> Tensor | None:
    tensors = [
        term.tensor.float() if term.tensor.dtype == torch.float64 else term.tensor
        for term in terms
        if isinstance(term, biases.Dense)
    ]
    return functools.reduce(operator.add, tensors) if tensors else None


def _keep(conjuncts: tuple[masks.Mask, ...]) -> Tensor | None:
    tensors = [mask.tensor for mask in conjuncts if isinstance(mask, masks.Dense)]
    return functools.reduce(operator.and_, tensors).view(torch.uint8) if tensors else None


def _least(lengths: list[Tensor]) -> Tensor | None:
    return functools.reduce(torch.minimum, lengths).contiguous() if lengths else None


def _documents(
    call: AttentionCall, conjuncts: tuple[masks.Mask, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """The document of each query and of each key."""
    documents = [mask.ids for mask in conjuncts if isinstance(mask, masks.Documents)]
    if not documents:
        return None, None
    ids = documents[0]
    for more in documents[1:]:
        # A number for each pair of numbers: the same in both.
        ids = ids.to(torch.int64) * (1 << 31) + more.to(torch.int64)
    tile = call.tile()
    rows = _at(ids, tile.query_position[:, 0, :, 0])
    return rows, _at(ids, tile.key_position[:, 0, 0, :])


def _at(ids_BL: Tensor, position: Tensor) -> Tensor:
    """``ids[b, position[b, n]]``; a position before the first is in a document of its own."""
    found = ids_BL.gather(1, position.clamp(min=0).expand(ids_BL.shape[0], -1))
    return torch.where(position >= 0, found, torch.iinfo(ids_BL.dtype).min).contiguous()
