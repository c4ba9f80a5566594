"""Linear layers for a few rows, where a backend is sooner done with them than torch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from zeta.transforms import is_closed_to_operators, is_overridden

MAX_ROWS = 64
"""Rows up to which asking is worth it: no backend takes more."""

Layer = tuple[Tensor, Tensor | None]
"""Weight ``(features, width)`` and bias ``(features,)``."""


def project_few(x: Tensor, layer: Layer) -> Tensor | None:
    """``x weight^T + bias``, in float32 sums; None where that is for torch.

    So it is wherever something watches or records what torch's operators do: a gradient, a
    transform, a mode, autocast, tensors of a class of their own.

    Args:
        x: ``(B, L, width)``.
        layer: Of ``x``.
    """
    if _is_for_torch(x, (layer,)):
        return None
    if torch.compiler.is_compiling():
        from zeta.ops.backends.cpu import projection_operators

        return projection_operators.project(x, layer)
    from zeta.ops.backends.cpu import projection

    return projection.project(x, layer)


def project_few_heads(
    x: Tensor, layers: Sequence[Layer], head_dim: int
) -> tuple[Tensor, ...] | None:
    """The same of one or three layers, in heads ``(B, heads, L, head_dim)``.

    Args:
        x, layers: The same.
        head_dim: Features of a head.
    """
    if _is_for_torch(x, layers):
        return None
    if torch.compiler.is_compiling():
        from zeta.ops.backends.cpu import projection_operators

        return projection_operators.project_heads(x, layers, head_dim)
    from zeta.ops.backends.cpu import projection

    return projection.project_heads(x, layers, head_dim)


def _is_for_torch(x: Tensor, layers: Sequence[Layer]) -> bool:
    """Whether something watches. Classes and devices the backend looks at itself."""
    if torch.is_autocast_enabled("cpu") or not x.is_cpu:
        return True
    if torch.compiler.is_compiling():
        return is_closed_to_operators() or torch.is_grad_enabled()
    if is_overridden() or x.is_neg():
        return True
    for weight, bias in layers:
        # What is negated is so on paper only, and C would not see it.
        if weight.is_neg() or (bias is not None and bias.is_neg()):
            return True
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or any(
        weight.requires_grad or (bias is not None and bias.requires_grad) for weight, bias in layers
    )
