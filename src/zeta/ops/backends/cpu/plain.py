"""Plain and causal calls without a gradient, straight to the library.

To describe a call, choose for it and take it apart again takes longer than a short call itself.
What this computes is what `cpu.run` would; whatever is not plainly right is left to it.

Shape suffixes: B batch, H query heads, G key heads, T target length, S source length, D head
dimension.
"""

from typing import get_args

import torch
from torch import Tensor

from zeta.ops.backends.cpu import library
from zeta.ops.precision import Precision, float32_precision
from zeta.ops.transforms import is_watched

_PRECISIONS = (None, *get_args(Precision))


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
        query: ``(B, H, T, D)``, if all is well; a plain tensor on the CPU, outside of a compiler.
        key, value: ``(B, G, S, D)``.
        scale: Of the scores; ``1 / sqrt(D)`` by default.
        is_causal: Hide from a query the keys after it; queries are the last of the keys.
        precision: As in `zeta.attention`.
    """
    if is_watched() or torch.is_autocast_enabled("cpu"):
        return None
    if not type(key) is type(value) is Tensor:
        return None
    if torch.is_grad_enabled() and (
        query.requires_grad or key.requires_grad or value.requires_grad
    ):
        return None
    if precision not in _PRECISIONS or library.obstacle() is not None:
        return None
    native = library.load()
    if native.direct is None:
        return None
    out = torch.empty_like(query)
    is_high = native.has_tiles and float32_precision(precision) == "high"
    answer = native.direct.attend(
        query, key, value, out, scale, is_causal, is_high, native.instruction_set,
        torch.get_num_threads(),
    )  # fmt: skip
    if answer == library.NOT_PLAIN:
        return None
    library.check(answer)
    return out
