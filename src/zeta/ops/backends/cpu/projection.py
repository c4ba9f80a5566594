"""Linear layers for a few rows, several of them in one pass: the projections of a decoding step.

What takes the time is to read the weights, which torch's products of matrices do at a fraction of
the memory's speed where there are few rows.
"""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from zeta.ops.backends.cpu import library
from zeta.transforms import constant_in_graphs

MAX_ROWS = 64
"""As in ``native/table.h``; of float32 and float16, where torch is slower even so."""
MAX_BFLOAT16 = 1 << 15
"""Rows times width; and always `FEW_ROWS`."""
FEW_ROWS = 16
FEW_ROWS_BESIDE_TILES = 4
"""In half precision where torch has tiles for it."""

Layer = tuple[Tensor, Tensor | None]
"""Weight ``(features, width)`` and bias ``(features,)``."""


def project(x: Tensor, layer: Layer) -> Tensor | None:
    """``x weight^T + bias``, ``(..., features)``.

    Args:
        x: ``(..., width)``, without a gradient.
        layer: The same.

    Returns:
        None where torch is to do it: there are too many rows, or a tensor is not plainly right.
    """
    direct, options = _ways(x)
    if direct is None:
        return None
    weight, bias = layer
    features = weight.shape[0]
    out = torch.empty_like(x) if features == x.shape[-1] else x.new_empty((*x.shape[:-1], features))
    answer = direct.project(x, out, *options, weight, bias)
    return out if library.is_done(answer) else None


def project_heads(x: Tensor, layers: Sequence[Layer], head_dim: int) -> tuple[Tensor, ...] | None:
    """``x weight^T + bias`` of each layer, ``(B, heads, L, head_dim)``; None as `project`.

    Args:
        x: ``(B, L, width)``, without a gradient.
        layers: The same, at most 3.
        head_dim: Features of a head.
    """
    direct, options = _ways(x)
    if direct is None:
        return None
    found = direct.project_heads(x, head_dim, *options, *chain.from_iterable(layers))
    return found if type(found) is tuple or library.is_done(found) else None


def _ways(x: Tensor) -> tuple[library.DirectCalls | None, tuple[int, int]]:
    """The library's builtins, if it has them here, and what they want to be told."""
    if library.obstacle() is not None:
        return None, (0, 0)
    rows = most_rows(x.dtype, x.shape[-1])
    return library.load().direct, (rows, torch.get_num_threads())


def most_rows(dtype: torch.dtype, width: int) -> int:
    """Up to how many rows the library is sooner done than torch."""
    if dtype != torch.float32 and _has_tiles():
        return FEW_ROWS_BESIDE_TILES
    if dtype == torch.bfloat16:
        return max(FEW_ROWS, MAX_BFLOAT16 // width)
    return MAX_ROWS


@constant_in_graphs
def _has_tiles() -> bool:
    return library.load().has_tiles
