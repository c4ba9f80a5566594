"""Linear layers for a few rows, where a backend is sooner done with them than torch."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zeta.ops.transforms import is_transforming

FEW = 16
"""Rows up to which asking is worth it."""

Layer = tuple[Tensor, Tensor | None]
"""Weight ``(features, width)`` and bias ``(features,)``."""


def project_few(x: Tensor, layers: Sequence[Layer]) -> tuple[Tensor, ...] | None:
    """``x weight^T + bias`` of each layer, in float32 sums; None where that is for torch.

    So it is wherever something watches or records what torch's operators do: a gradient, a
    compiler, a transform, a mode, autocast, tensors of a class of their own.

    Args:
        x: ``(..., width)``.
        layers: Of the same ``x``.
    """
    if torch.compiler.is_compiling() or not _is_plain(x) or _is_watched():
        return None
    for weight, bias in layers:
        if not _is_plain(weight) or not (bias is None or _is_plain(bias)):
            return None
    from zeta.ops.backends.cpu import projection

    return projection.project(x, layers)


def _is_plain(tensor: Tensor) -> bool:
    """On the CPU, of no class of its own, and without a gradient."""
    kind = type(tensor)
    return (
        (kind is nn.Parameter or kind is Tensor)
        and tensor.is_cpu
        and not (tensor.requires_grad and torch.is_grad_enabled())
    )


def _is_watched() -> bool:
    return (
        torch.is_autocast_enabled("cpu")
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or is_transforming()
    )
