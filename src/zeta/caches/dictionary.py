"""The documented ``incremental_state``: a plain dict, as a cache.

Everything in the dict is a tensor whose first dimension is the batch, so that
``{name: t.index_select(0, order) for name, t in state.items()}`` reorders beams:

- ``prev_key``, ``prev_value``: ``(B, G, L, D)``, keys and values so far; keys rotated already;
- ``prev_key_padding_mask``: ``(B, L)``, there once any padding was given;
- ``prev_key_rotated``: ``(B,)``, there where the attention rotates its keys;
- ``prev_key_origin``: ``(B,)``, there where xPos counts from another position than 0;
- ``prev_key_static``: ``(B,)``, there in a cross-attention's dict;
- ``prev_queries``: ``(B,)``, number of queries so far, there in that of a multiway cross-attention.

Shapes: B batch, G key heads, N new tokens, L all tokens so far, D head dimension.
"""

from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor

from zeta.caches.form import following
from zeta.caches.growth import append
from zeta.caches.interface import Cached
from zeta.caches.padding import check_padding, kept_padding
from zeta.values import check_tensor

KEY, VALUE, PADDING = "prev_key", "prev_value", "prev_key_padding_mask"
ROTATED, ORIGIN = "prev_key_rotated", "prev_key_origin"
STATIC, QUERIES = "prev_key_static", "prev_queries"


class DictCache:
    """Self-attention's keys and values in a dict.

    A dict with ``prev_key`` and ``prev_value`` alone is TorchScale's and is taken over. TorchScale
    keeps keys as they are before xPos, so where the attention rotates, they are rotated then.

    Args:
        state: The dict; `update` writes to it.
        rotate: How the attention rotates keys ``(B, G, L, D)`` that begin at position 0; None: it
            does not.

    Raises:
        TypeError: It is no dict, or holds keys or values that are no tensors.
        ValueError: The dict belongs to another kind of attention, or holds only one of the two.
    """

    def __init__(
        self, state: MutableMapping[str, Any], rotate: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        check_dict(state)
        if STATIC in state:
            raise ValueError(
                "incremental_state holds the keys of a cross-attention; "
                "give each attention its own dict"
            )
        if rotate is None and ROTATED in state:
            raise ValueError("incremental_state holds rotated keys, of an attention with positions")
        self._state = state
        self._rotate = rotate
        self._before: dict[str, Any] = {}

    @property
    def length(self) -> int:
        """Tokens so far."""
        key: Tensor | None = self._state.get(KEY)
        return 0 if key is None else key.shape[2]

    def next_positions(self, num_tokens: int, device: torch.device) -> Tensor:
        """See `zeta.caches.Cache`."""
        return following(self.length, num_tokens, device)

    def origin(self, first: Tensor | None) -> Tensor | None:
        """See `zeta.caches.Cache`."""
        return self._state.get(ORIGIN) if self.length else first

    def update(
        self,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        *,
        origin: Tensor | None = None,
    ) -> Cached:
        """Append tokens; see `zeta.caches.Cache`."""
        state = self._state
        batch, _, added, _ = key.shape
        length = added
        before_key: Tensor | None = state.get(KEY)
        before_value: Tensor | None = state.get(VALUE)
        if before_key is not None and before_value is not None:
            check_fits(KEY, before_key, key)
            check_fits(VALUE, before_value, value)
            length += before_key.shape[2]
            if before_value.shape[2] != before_key.shape[2]:
                raise ValueError(
                    f"incremental_state must hold as many values as keys; "
                    f"got {before_value.shape[2]} and {before_key.shape[2]}"
                )
        remembered = state.get(PADDING)
        if remembered is not None:
            check_padding(f"incremental_state[{PADDING!r}]", remembered, batch, length - added)
        padding = kept_padding(
            remembered, key_padding_mask, batch=batch, length=length, added=added
        )
        if before_key is not None and self._rotate is not None and ROTATED not in state:
            before_key = self._rotate(before_key)
        key, value = append(before_key, key), append(before_value, value)
        self._before = dict(state)
        state[KEY], state[VALUE] = key, value
        if padding is not None:
            state[PADDING] = padding
        if self._rotate is not None and ROTATED not in state:
            state[ROTATED] = _flag(key)
        if origin is not None:
            state[ORIGIN] = origin.expand(batch)
        return Cached(key, value, None, padding)

    def take_back(self) -> None:
        """Undo the last `update`: the call that it was for has failed."""
        self._state.clear()
        self._state.update(self._before)


def check_dict(state: object) -> None:
    """Raise unless ``state`` is a dict, or like one, that holds keys and values, or neither.

    Raises:
        TypeError: It is no dict, or keys or values are no tensors.
        ValueError: It has one of the two.
    """
    if not isinstance(state, MutableMapping):
        raise TypeError(f"state must be a dict; got {type(state).__name__}")
    if (KEY in state) != (VALUE in state):
        raise ValueError(f"incremental_state must hold both of {KEY!r} and {VALUE!r}, or neither")
    for name in (KEY, VALUE):
        if name in state:
            check_tensor(f"incremental_state[{name!r}]", state[name])


def check_fits(name: str, before: Tensor, new: Tensor) -> None:
    """Raise ValueError unless keys or values of new tokens can follow those of earlier ones."""
    if before.dim() != 4 or before.shape[:2] != new.shape[:2] or before.shape[3] != new.shape[3]:
        batch, heads, _, head_dim = new.shape
        raise ValueError(
            f"incremental_state[{name!r}] must have shape ({batch}, {heads}, length, {head_dim}): "
            f"batch, key heads, length, head_dim; got {tuple(before.shape)}"
        )
    if before.dtype != new.dtype or before.device != new.device:
        raise ValueError(
            f"incremental_state[{name!r}] must be {new.dtype} on {new.device}; "
            f"got {before.dtype} on {before.device}"
        )


def _flag(key: Tensor) -> Tensor:
    return torch.ones(key.shape[0], dtype=torch.bool, device=key.device)
