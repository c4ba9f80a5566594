"""Offset biases as vectors, and T5's without finding its buckets each time.

Shape suffix: R offsets.
"""

import functools
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from zeta import biases
from zeta.positions import t5_buckets
from zeta.transforms import is_watched
from zeta.values import wide_dtype

MAX_KEPT_REACH = 1 << 13
"""The longest reach of a T5 bias whose buckets are kept: 128 kB."""


def is_by_offset(term: biases.Bias) -> TypeGuard[biases.OffsetBias]:
    """Whether its vector says all of it: a subclass may add something else to the scores."""
    if not isinstance(term, biases.OffsetBias):
        return False
    kind = type(term)
    asks_at = kind.apply is biases.Additive.apply and kind.values is biases.OffsetBias.values
    return asks_at or term.meaning is biases.Alibi


def is_learned(term: biases.Bias) -> bool:
    """Whether a gradient is to be found of it."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in term.tensors())


def offset_vector(term: biases.OffsetBias, reach: int, device: torch.device) -> Tensor:
    """``term.offset_vector(reach, device)``, without finding T5's buckets each time."""
    if type(term) is not biases.Bucketed or torch.compiler.is_compiling() or is_watched():
        return term.offset_vector(reach, device)
    if reach > term.max_distance or not has_kept_buckets(term):
        return term.offset_vector(reach, device)
    wide = term.table.to(wide_dtype(term.table.dtype))
    return F.embedding(kept_buckets(term, reach), wide).T


def has_kept_buckets(term: biases.Bucketed) -> bool:
    """Whether the buckets of a T5 bias are kept. While a CUDA graph is recorded they are found:
    what it reads must last as long as the graph does.
    """
    if term.max_distance > MAX_KEPT_REACH:
        return False
    table = term.table
    return table.is_cpu or (table.is_cuda and not torch.cuda.is_current_stream_capturing())


def kept_buckets(term: biases.Bucketed, reach: int) -> Tensor:
    """Of offsets ``-reach .. reach``, no further than the bias's own reach."""
    table = term.table
    return _middle(term.bidirectional, table.shape[0], term.max_distance, table.device, reach)


@functools.lru_cache(maxsize=256)
def _middle(
    bidirectional: bool, num_buckets: int, max_distance: int, device: torch.device, reach: int
) -> Tensor:
    """Buckets of offsets ``-reach .. reach``: slicing takes a short call longer than looking."""
    buckets_R = _buckets(bidirectional, num_buckets, max_distance, device)
    with torch.inference_mode(False):
        return buckets_R[max_distance - reach : max_distance + reach + 1]


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
