"""State dicts of the caches that keep keys and values as they are.

Shapes: B batch, G key heads, L tokens so far, D head dimension.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from zeta.caches import checks
from zeta.caches.form import Form

STATE_NAMES = {"form", "key", "value", "padding", "origin"}


class Tokens(NamedTuple):
    """What a state dict holds: keys ``(B, G, L, D)``, values, padding ``(B, L)`` or None, origin
    ``(B,)`` or None."""

    form: Form
    key: Tensor
    value: Tensor
    padding: Tensor | None
    origin: Tensor | None


def dict_of(kind: str, tokens: Tokens | None) -> dict[str, Any]:
    """The state dict of a cache: copies of its tokens, or None for each of an empty one."""
    state: dict[str, Any] = dict.fromkeys(sorted(STATE_NAMES))
    state[checks.KIND] = kind
    if tokens is not None:
        form, key, value, padding, origin = tokens
        state["form"] = tuple(form[:5])
        state["key"] = key.clone(memory_format=torch.contiguous_format)
        state["value"] = value.clone(memory_format=torch.contiguous_format)
        state["padding"] = None if padding is None else padding.clone()
        state["origin"] = None if origin is None else origin.clone()
    return state


def tokens_of(state: dict[str, Any]) -> Tokens | None:
    """The tokens of a state dict whose keys were checked; None for that of an empty cache.

    Raises:
        ValueError: A tensor has the wrong shape or dtype.
    """
    if state["form"] is None:
        return None
    batch, heads, head_dim, value_dim, dtype = state["form"]
    key = checks.state_tensor("key", state["key"], (batch, heads, -1, head_dim), dtype)
    length = key.shape[2]
    value = checks.state_tensor("value", state["value"], (batch, heads, length, value_dim), dtype)
    padding = state["padding"]
    if padding is not None:
        padding = checks.state_tensor("padding", padding, (batch, length), padding.dtype)
    form = Form(batch, heads, head_dim, value_dim, dtype, key.device)
    return Tokens(form, key, value, padding, origin_of(state, batch))


def origin_of(state: dict[str, Any], batch: int) -> Tensor | None:
    """The origin of a state dict.

    Raises:
        ValueError: It has the wrong shape or dtype.
    """
    origin = state["origin"]
    return None if origin is None else checks.state_tensor("origin", origin, (batch,), torch.int64)
