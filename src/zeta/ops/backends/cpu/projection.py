"""Linear layers for a few rows, several of them in one pass: the projections of a decoding step.

What takes the time is to read the weights, which torch's products of matrices do at a fraction of
the memory's speed where there are few rows.
"""

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from zeta.ops.backends.cpu import library
from zeta.ops.backends.cpu.description import DTYPES

MOST_LAYERS, MOST_ROWS = 3, 16
"""As in ``native/abi.h``."""
MOST_ROWS_BESIDE_TILES = 4
"""In half precision where torch has tiles for it."""

_WORDS = 9 + 6 * MOST_LAYERS
_PROJECTION = struct.Struct(f"={_WORDS}q")
NUM_BYTES = _PROJECTION.size

Layer = tuple[Tensor, Tensor | None]
"""Weight ``(features, width)`` and bias ``(features,)``."""


def project(x: Tensor, layers: Sequence[Layer]) -> tuple[Tensor, ...] | None:
    """``x weight^T + bias`` of each layer, ``(..., features)``, side by side in one memory.

    Args:
        x: ``(..., width)``, on the CPU, without a gradient.
        layers: The same.

    Returns:
        None where torch is to do it: there are too many rows, or tensors lie differently.
    """
    # One loop, and no call that can be spared: it runs twice in a step of microseconds.
    *batch, width = x.shape
    dtype = x.dtype
    if dtype not in DTYPES or len(layers) > MOST_LAYERS or library.obstacle() is not None:
        return None
    native = library.load()
    rows = x.numel() // width
    if not 0 < rows <= _most_rows(dtype, native):
        return None
    if not x.is_contiguous():
        x = x.contiguous()
    total = 0
    for weight, _ in layers:
        total += weight.shape[0]
    out = torch.empty((*batch, total), dtype=dtype)
    to, item_bytes = out.data_ptr(), x.itemsize
    words = [
        NUM_BYTES, DTYPES[dtype], native.instruction_set, torch.get_num_threads(),
        rows, width, x.data_ptr(), width, len(layers),
    ]  # fmt: skip
    sizes = []
    for weight, bias in layers:
        strides = weight.stride()
        features, *depth = weight.shape
        if depth != [width] or strides[1] != 1 or weight.dtype != dtype:
            return None
        bias_pointer = 0
        if bias is not None:
            if bias.dtype != dtype or bias.stride() != (1,):
                return None
            bias_pointer = bias.data_ptr()
        words += weight.data_ptr(), bias_pointer, to, strides[0], total, features
        sizes.append(features)
        to += features * item_bytes
    words += (0,) * (_WORDS - len(words))
    library.check(native.project(_PROJECTION.pack(*words)))
    return (out,) if len(sizes) == 1 else torch.split_with_sizes(out, sizes, -1)


def _most_rows(dtype: torch.dtype, native: library.Library) -> int:
    is_tiled = dtype != torch.float32 and library.INSTRUCTION_SETS[-1] in native.processor
    return MOST_ROWS_BESIDE_TILES if is_tiled else MOST_ROWS
