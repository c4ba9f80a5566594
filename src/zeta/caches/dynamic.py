"""`DynamicCache`: every token, in tensors that double when they are full.

Shapes: B batch, G key heads, L tokens so far, D head dimension.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from zeta.caches.dictionary import KEY, ORIGIN, PADDING, ROTATED, STATIC, VALUE
from zeta.caches.form import Form
from zeta.caches.growing import GrowingCache


class DynamicCache(GrowingCache):
    """The cache to take when nothing is known of the length.

    A step copies the new tokens only; when there is no more room, all tokens move to twice the
    room. Forking costs nothing. Keys and values that require a gradient keep it: they are joined by
    ``torch.cat`` then, which copies at every step.

    Args:
        state: A dict with ``prev_key`` and ``prev_value``, ``(B, G, L, D)``, and possibly
            ``prev_key_padding_mask``, ``(B, L)``, as `MultiheadAttention` leaves it; it is copied,
            not written to. Where the attention rotates, the keys must be rotated.

    Raises:
        ValueError: The dict belongs to a cross-attention, or has only one of the two.
    """

    _part_names = ("key", "value")

    def __init__(self, state: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        if not state:
            return
        if STATIC in state:
            raise ValueError("state holds the keys of a cross-attention, which do not grow")
        unknown = set(state) - {KEY, VALUE, PADDING, ROTATED, ORIGIN}
        if KEY not in state or VALUE not in state or unknown:
            raise ValueError(
                f"state must have {KEY!r} and {VALUE!r}, and possibly {PADDING!r}; "
                f"got {sorted(state)}"
            )
        self.update(state[KEY], state[VALUE], state.get(PADDING), origin=state.get(ORIGIN))

    @property
    def key(self) -> Tensor | None:
        """Keys so far, ``(B, G, L, D)``; None before the first."""
        return None if self._state is None else self._state.parts[0]

    @property
    def value(self) -> Tensor | None:
        """Values so far, ``(B, G, L, Dv)``; None before the first."""
        return None if self._state is None else self._state.parts[1]

    def _encode(self, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        return key, value

    def _decode(self, form: Form, parts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        key, value = parts
        return key, value

    def _part_forms(self, form: Form) -> tuple[tuple[int, torch.dtype], ...]:
        return (form.head_dim, form.dtype), (form.value_dim, form.dtype)
