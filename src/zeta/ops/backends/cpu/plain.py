"""Plain and causal calls without a gradient, straight to the library.

To describe a call, choose for it and take it apart again takes longer than a short call itself.
What this computes is what `cpu.run` would; whatever is not plainly right is left to it.

Shape suffixes: B batch, H query heads, G key heads, T target length, S source length, D head
dimension.
"""

import math
import struct

import torch
from torch import Tensor

from zeta.ops.backends.cpu import MAX_HEAD_DIM, library
from zeta.ops.backends.cpu.description import DTYPES
from zeta.ops.backends.cpu.layout import FORMAT, NUM_BYTES, OFFSETS
from zeta.ops.backends.cpu.passes import DECODED_ROWS
from zeta.ops.buffers import empty_rows
from zeta.ops.precision import Precision, float32_precision
from zeta.ops.transforms import is_watched


def _fields(first: str, end: str) -> str:
    return "=" + FORMAT[OFFSETS[first] // 8 : OFFSETS[end] // 8]


# A record in four pieces: what is asked, zeros, where the output goes, zeros.
_HEAD = struct.Struct(_fields("bytes", "prefix"))
_NOTHING_ELSE = bytes(OFFSETS["out"] - OFFSETS["prefix"])
_OUT = struct.Struct(_fields("out", "grad_out"))
_NO_GRADIENT = bytes(NUM_BYTES - OFFSETS["grad_out"])


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    is_causal: bool,
    precision: Precision | None,
) -> Tensor | None:
    """The output ``(B, H, T, D)``; None where the call must be checked and described.

    Args:
        query: ``(B, H, T, D)``, if all is well; so are the others.
        key, value: ``(B, G, S, D)``.
        scale: Of the scores; ``1 / sqrt(D)`` by default.
        is_causal: Hide from a query the keys after it; queries are the last of the keys.
        precision: As in `zeta.attention`.
    """
    if torch.compiler.is_compiling() or is_watched() or torch.is_autocast_enabled("cpu"):
        return None
    # A subclass may hold its numbers elsewhere.
    if not type(query) is type(key) is type(value) is Tensor:
        return None
    if torch.is_grad_enabled() and (
        query.requires_grad or key.requires_grad or value.requires_grad
    ):
        return None
    shape, source_shape, dtype = query.shape, key.shape, query.dtype
    if len(shape) != 4 or len(source_shape) != 4 or source_shape != value.shape:
        return None
    batch, heads, target, head_dim = shape
    source_batch, key_heads, source, source_dim = source_shape
    if source_batch != batch or source_dim != head_dim or head_dim > MAX_HEAD_DIM:
        return None
    if 0 in shape or 0 in source_shape or heads % key_heads:
        return None
    if dtype not in DTYPES or key.dtype is not dtype or value.dtype is not dtype:
        return None
    if not (query.is_cpu and key.is_cpu and value.is_cpu) or library.obstacle() is not None:
        return None
    *query_strides, query_step = query.stride()
    *key_strides, key_step = key.stride()
    *value_strides, value_step = value.stride()
    if not query_step == key_step == value_step == 1:
        return None
    native = library.load()
    out = torch.empty_like(query) if query.is_contiguous() else empty_rows(query, head_dim)
    is_high = dtype is torch.float32 and float32_precision(precision) == "high"
    record = (
        _HEAD.pack(
            NUM_BYTES, DTYPES[dtype], is_high, native.instruction_set, torch.get_num_threads(),
            batch, heads, key_heads, target, source, head_dim, head_dim,
            query.data_ptr(), *query_strides, key.data_ptr(), *key_strides,
            value.data_ptr(), *value_strides,
            1.0 / math.sqrt(head_dim) if scale is None else scale, is_causal, 0,
        )
        + _NOTHING_ELSE
        + _OUT.pack(out.data_ptr(), *out.stride()[:3], 0)
        + _NO_GRADIENT
    )  # fmt: skip
    is_step = target * heads <= DECODED_ROWS * key_heads
    library.check(native.decode(record) if is_step else native.forward(record))
    return out
