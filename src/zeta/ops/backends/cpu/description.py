"""A call as the library reads it: a `layout.Record` filled in from tensors.

Everything that C relies on is seen to here: dense last dimensions, dtypes, strides, lengths of
vectors. A record holds addresses only, so whoever has one keeps the tensors until C returns.

Shape suffixes: B batch, H query heads, G key heads, T target length, S source length, R offsets.
"""

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zeta.ops.backends.cpu.layout import NUM_BYTES, Part, Record
from zeta.ops.buffers import written_out
from zeta.ops.dropout import threshold

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""`ZetaDtype`."""

MAX_HEAD_DIM = 256
"""``ZETA_MOST_FEATURES``."""
_BEYOND = 2**31 - 1
"""A length or a window that hides nothing."""

Filled = ctypes.Array[ctypes.c_char]


def address(tensor: Tensor) -> int:
    """Where the tensor's numbers begin.

    Raises:
        RuntimeError: Nowhere.
    """
    found = tensor.data_ptr()
    if not found and tensor.numel():
        raise RuntimeError(
            f"a {type(tensor).__name__} of shape {tuple(tensor.shape)} has no memory of its own: "
            "its storage was given back, or its class keeps the numbers elsewhere"
        )
    return found


class Fixed(NamedTuple):
    """What needs no gradient, as the operators get it.

    Attributes:
        tensors: In the order of `Lowered.fixed`, or none at all.
        high: Products of float32 may be made of two parts of a number instead of three.
    """

    tensors: Sequence[Tensor | None]
    scale: float
    causal: bool
    window: int
    softcap: float
    softcap_first: bool
    dropout_p: float
    high: bool


_HEAD = Part("bytes", "window")


def describe(query: Tensor, key: Tensor, value: Tensor | None, fixed: Fixed) -> Filled:
    """A new record of these tensors, made of dense `rows`; of no values, for weights."""
    record = Record()
    batch, heads, target, head_dim = query.shape
    *_, key_heads, source, _ = key.shape
    value_rows: tuple[int, ...]
    if value is None:
        value_dim, value_rows = 0, (0, 0, 0, 0)
    else:
        value_dim, value_rows = value.shape[3], (address(value), *value.stride()[:3])
    _HEAD.write(
        record,
        NUM_BYTES, DTYPES[query.dtype], fixed.high, torch.get_num_threads(),
        batch, heads, key_heads, target, source, head_dim, value_dim,
        address(query), *query.stride()[:3], address(key), *key.stride()[:3], *value_rows,
        fixed.scale, fixed.causal, min(fixed.window, _BEYOND),
    )  # fmt: skip
    return record


def describe_scores(
    record: Filled, offsets: Tensor | None, dense: Tensor | None, fixed: Fixed
) -> list[Tensor]:
    """Write everything between the products and the softmax.

    Returns:
        What the record then points to, to be kept until C returns.
    """
    kept: list[Tensor] = []
    if any(tensor is not None for tensor in fixed.tensors):
        _describe_fixed(record, fixed.tensors, kept)
    if fixed.softcap:
        _SOFTCAP.write(record, fixed.softcap, fixed.softcap_first)
    if offsets is not None:
        assert offsets.shape == (_HEADS.read(record)[0], offsets.shape[1] | 1)
        _OFFSETS.write(record, _vector(offsets, torch.float32, kept), offsets.shape[1] // 2)
    if dense is not None:
        dense = written_out(dense)
        if dense.dtype not in DTYPES:
            dense = dense.float()
        kept.append(dense)
        describe_plane(record, DENSE, dense)
    if fixed.dropout_p:
        seed = fixed.tensors[-1]
        assert seed is not None
        _DROPOUT.write(record, fixed.dropout_p, threshold(fixed.dropout_p), int(seed))
    return kept


def describe_plane(record: Filled, part: Part, tensor: Tensor) -> None:
    """Write a tensor, kept by the caller, that broadcasts to ``(B, H, T, S)``."""
    strides = [
        0 if size == 1 else stride
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ]
    dtype = 0 if tensor.dtype == torch.uint8 else DTYPES[tensor.dtype]
    part.write(record, address(tensor), dtype, *strides)


def _describe_fixed(record: Filled, tensors: Sequence[Tensor | None], kept: list[Tensor]) -> None:
    slopes, prefix, padding, document_rows, document_columns, keep, *positions, _ = tensors
    if slopes is not None:
        _SLOPES.write(record, _vector(slopes, torch.float32, kept))
    for part, lengths in ((_PREFIX, prefix), (_PADDING, padding)):
        if lengths is not None:
            part.write(record, _vector(lengths, torch.int64, kept))
    labels = zip(_LABELS, (document_rows, document_columns, *positions), strict=True)
    for (part, dtype), label in labels:
        if label is not None:
            batch = 0 if label.shape[0] == 1 else label.shape[1]
            part.write(record, _vector(label, dtype, kept), batch)
    if keep is not None:
        describe_plane(record, _KEEP, keep)


def _vector(tensor: Tensor, dtype: torch.dtype, kept: list[Tensor]) -> int:
    """The address of the tensor's numbers, contiguous and of that dtype."""
    tensor = written_out(tensor)
    if tensor.dtype != dtype or not tensor.is_contiguous():
        tensor = tensor.detach().to(dtype).contiguous()
    kept.append(tensor)
    return address(tensor)


_HEADS = Part("heads")
_PREFIX, _PADDING = Part("prefix"), Part("padding")
_LABELS = (
    (Part("document_rows"), torch.int64),
    (Part("document_columns"), torch.int64),
    (Part("query_positions"), torch.int32),
    (Part("key_positions"), torch.int32),
)
_KEEP = Part("keep")
_SOFTCAP = Part("softcap", "softcap_first")
_OFFSETS = Part("offsets", "reach")
_SLOPES = Part("slopes")
_DROPOUT = Part("dropout_p", "seed")
DENSE = Part("dense")
