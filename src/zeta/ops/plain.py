"""Calls with common masks and biases, at once where a backend can: a short one takes less time
than it takes to describe it.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from zeta.biases import Bias
from zeta.masks import Causal, Mask
from zeta.ops.call import AttentionCall
from zeta.ops.dropout import threshold
from zeta.ops.plain_lowering import Plain, plainly_lowered
from zeta.ops.precision import Precision
from zeta.transforms import is_closed_to_operators, is_watched

_EXACT = 2**53
"""Integers below this are floats."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask | None,
    bias: Bias | None = None,
    scale: float | None = None,
    precision: Precision | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor | None:
    """Attention ``(B, H, T, D)``; None where the call has to be checked and a backend chosen.

    Args:
        query, key, value, mask, bias, scale, precision, dropout_p, seed: As `zeta.attention` takes
            them, not checked; a seed where there is dropout.
    """
    if torch.compiler.is_compiling():
        if not query.is_cpu or bias is not None or dropout_p != 0 or precision is not None:
            return None
        if not (mask is None or type(mask) is Causal) or is_closed_to_operators():
            return None
        if not (scale is None or type(scale) is float or type(scale) is int):
            return None
        from zeta.ops.backends.cpu import operators

        return operators.attend(query, key, value, scale, mask is not None)
    if is_watched():
        return None
    # A subclass may hold its numbers elsewhere.
    if type(query) is not Tensor or not query.is_cpu or torch.is_autocast_enabled("cpu"):
        return None
    if query.is_nested:
        return None
    if type(scale) is int and abs(scale) < _EXACT:
        scale = float(scale)
    longest = 0
    if bias is not None:
        if type(key) is not Tensor or query.dim() != 4 or key.dim() != 4:
            return None
        longest = max(query.shape[2], key.shape[2])
    plain = plainly_lowered(mask, bias, longest)
    if plain is not None and dropout_p != 0:
        plain = _with_dropout(plain, dropout_p, seed)
    return None if plain is None else _cpu()(query, key, value, scale, plain, precision)


def _with_dropout(plain: Plain, dropout_p: float, seed: int | Tensor | None) -> Plain | None:
    if type(seed) is Tensor and seed.is_cpu and seed.dtype == torch.int64 and seed.dim() == 0:
        seed = int(seed)
    if type(seed) is not int or type(dropout_p) is not float or not 0.0 < dropout_p < 1.0:
        return None
    return plain._replace(dropout_p=dropout_p, drop_below=threshold(dropout_p), seed=seed)


@functools.cache
def _cpu() -> Callable[..., Tensor | None]:
    from zeta.ops.backends.cpu import plain

    return plain.attend


def attend_call(call: AttentionCall) -> Tensor | None:
    """The same of a call, whatever it is."""
    if call.sinks is not None:
        return None
    if call.query_positions is not None or call.key_positions is not None:
        return None
    return attend(
        call.query, call.key, call.value, call.mask, call.bias, call.scale, call.precision,
        call.dropout_p, call.seed,
    )  # fmt: skip
