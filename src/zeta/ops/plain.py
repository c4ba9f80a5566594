"""Calls with common masks and biases, at once where a backend can: a short one takes less time
than it takes to describe it.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from zeta.biases import Bias
from zeta.masks import Mask
from zeta.ops.call import AttentionCall
from zeta.ops.lowering import plainly_lowered
from zeta.ops.precision import Precision


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask | None,
    bias: Bias | None = None,
    scale: float | None = None,
    precision: Precision | None = None,
) -> Tensor | None:
    """Attention ``(B, H, T, D)``; None where the call has to be checked and a backend chosen.

    Args:
        query, key, value, mask, bias, scale, precision: As `zeta.attention` takes them, not
            checked.
    """
    if torch.compiler.is_compiling():
        return None
    # A subclass may hold its numbers elsewhere.
    if type(query) is not Tensor or not query.is_cpu:
        return None
    longest = 0
    if bias is not None:
        if type(key) is not Tensor or query.dim() != 4 or key.dim() != 4:
            return None
        longest = max(query.shape[2], key.shape[2])
    plain = plainly_lowered(mask, bias, longest)
    return None if plain is None else _cpu()(query, key, value, scale, plain, precision)


@functools.cache
def _cpu() -> Callable[..., Tensor | None]:
    from zeta.ops.backends.cpu import plain

    return plain.attend


def attend_call(call: AttentionCall) -> Tensor | None:
    """The same of a call, whatever it is."""
    if call.dropout_p or call.sinks is not None:
        return None
    if call.query_positions is not None or call.key_positions is not None:
        return None
    return attend(
        call.query, call.key, call.value, call.mask, call.bias, call.scale, call.precision
    )
