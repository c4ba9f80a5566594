"""Calls without a bias under the common masks, at once where a backend can: a short one takes
less time than it takes to describe it.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from zeta.masks import Mask
from zeta.ops.call import AttentionCall
from zeta.ops.lowering import plainly_hidden
from zeta.ops.precision import Precision


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask | None,
    scale: float | None,
    precision: Precision | None = None,
) -> Tensor | None:
    """Attention ``(B, H, T, D)``; None where the call has to be checked and a backend chosen.

    Args:
        query, key, value, mask, scale, precision: As `zeta.attention` takes them, not checked.
    """
    if torch.compiler.is_compiling():
        return None
    # A subclass may hold its numbers elsewhere.
    if type(query) is not Tensor or not query.is_cpu:
        return None
    hidden = plainly_hidden(mask)
    return None if hidden is None else _cpu()(query, key, value, scale, hidden, precision)


@functools.cache
def _cpu() -> Callable[..., Tensor | None]:
    from zeta.ops.backends.cpu import plain

    return plain.attend


def attend_call(call: AttentionCall) -> Tensor | None:
    """The same of a call, whatever it is."""
    if call.bias is not None or call.dropout_p or call.sinks is not None:
        return None
    if call.query_positions is not None or call.key_positions is not None:
        return None
    return attend(call.query, call.key, call.value, call.mask, call.scale, call.precision)
