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
    batch, heads, head_dim, value_dim, dtype = sizes_of(state)
    key = checks.state_tensor("key", state["key"], (batch, heads, -1, head_dim), dtype)
    length = key.shape[2]
    value = checks.state_tensor("value", state["value"], (batch, heads, length, value_dim), dtype)
    form = Form(batch, heads, head_dim, value_dim, dtype, key.device)
    return Tokens(form, key, value, padding_of(state, batch, length), origin_of(state, batch))


def sizes_of(state: dict[str, Any]) -> tuple[int, int, int, int, torch.dtype]:
    """What the state dict of a cache that is not empty calls its form: all of a `Form` but where
    it is.

    Raises:
        ValueError: It is something else.
    """
    form = state["form"]
    match form:
        case (int(batch), int(heads), int(head_dim), int(value_dim), torch.dtype() as dtype):
            if min(batch, heads, head_dim, value_dim) > 0:
                return batch, heads, head_dim, value_dim, dtype
    raise ValueError(
        "state['form'] must be (batch, key heads, head_dim, value's head_dim, dtype) or None; "
        f"got {form!r}"
    )


def padding_of(state: dict[str, Any], batch: int, length: int) -> Tensor | None:
    """The padding of a state dict.

    Raises:
        ValueError: It has the wrong shape or dtype.
    """
    padding = state["padding"]
    if padding is None:
        return None
    is_float = isinstance(padding, Tensor) and padding.is_floating_point()
    dtype = padding.dtype if is_float else torch.bool
    return checks.state_tensor("padding", padding, (batch, length), dtype)


def origin_of(state: dict[str, Any], batch: int) -> Tensor | None:
    """The origin of a state dict.

    Raises:
        ValueError: It has the wrong shape or dtype.
    """
    origin = state["origin"]
    return None if origin is None else checks.state_tensor("origin", origin, (batch,), torch.int64)
