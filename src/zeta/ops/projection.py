"""Linear layers for a few rows, where a backend is sooner done with them than torch."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zeta.ops.transforms import is_watched

FEW = 16
"""Rows up to which asking is worth it."""

_PLAIN = (Tensor, nn.Parameter)

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
    if torch.compiler.is_compiling() or _is_watched():
        return None
    tensors = [x]
    for weight, bias in layers:
        tensors.append(weight)
        if bias is not None:
            tensors.append(bias)
    has_gradients = torch.is_grad_enabled()
    for tensor in tensors:
        if type(tensor) not in _PLAIN or not tensor.is_cpu:
            return None
        if has_gradients and tensor.requires_grad:
            return None
    from zeta.ops.backends.cpu import projection

    return projection.project(x, layers)


def _is_watched() -> bool:
    return (
        torch.is_autocast_enabled("cpu") or torch._C._len_torch_function_stack() > 0 or is_watched()
    )
