"""`GrowingCache`, the base of the caches that keep every token, in tensors that double.

Shapes: B batch, G key heads, N new tokens, L all tokens so far, D head dimension.
"""

import abc
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from zeta.caches import checks, growth
from zeta.caches.forks import Forks
from zeta.caches.form import Form, following, placed
from zeta.caches.interface import Cached
from zeta.caches.padding import kept_padding
from zeta.caches.states import origin_of, padding_of, sizes_of


class _State(NamedTuple):
    """All tokens. Never written to, so that a fork is a reference."""

    form: Form
    parts: tuple[Tensor, ...]
    padding: Tensor | None
    origin: Tensor | None

    @property
    def length(self) -> int:
        return self.parts[0].shape[2]

    def moved(self, number: int, grown: Tensor) -> "_State":
        """The same tokens, a part of them at the beginning of a tensor to which it was copied."""
        if not growth.is_copy(self.parts[number], grown):
            return self
        parts = list(self.parts)
        parts[number] = grown.narrow(2, 0, self.length)
        return self._replace(parts=tuple(parts))


class GrowingCache(abc.ABC):
    """Every token, encoded as tensors ``(B, G, L, ...)``, the parts."""

    _part_names: tuple[str, ...]

    def __init__(self) -> None:
        self._state: _State | None = None
        self._before: _State | None = None
        self._forks: Forks[_State | None] = Forks()

    @abc.abstractmethod
    def _encode(self, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """What is kept of tokens: tensors ``(B, G, N, ...)``."""

    @abc.abstractmethod
    def _decode(self, form: Form, parts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Keys ``(B, G, L, D)`` and values ``(B, G, L, Dv)`` from what is kept."""

    @abc.abstractmethod
    def _part_forms(self, form: Form) -> tuple[tuple[int, torch.dtype], ...]:
        """Last dimension and dtype of each part."""

    @property
    def length(self) -> int:
        """Tokens so far."""
        return 0 if self._state is None else self._state.length

    def next_positions(self, num_tokens: int, device: torch.device) -> Tensor:
        """See `Cache`."""
        return following(self.length, num_tokens, device)

    def origin(self, first: Tensor | None) -> Tensor | None:
        """See `Cache`."""
        return first if self._state is None or not self._state.length else self._state.origin

    def update(
        self,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        *,
        origin: Tensor | None = None,
    ) -> Cached:
        """See `Cache`."""
        form = Form.of(key, value)
        remembered, length = None, 0
        if self._state is not None:
            self._state.form.check(form)
            remembered, length = self._state.padding, self._state.length
        added = key.shape[2]
        padding = kept_padding(
            remembered, key_padding_mask, batch=form.batch, length=length + added, added=added
        )
        origin = None if origin is None else origin.expand(form.batch)
        parts = self._appended(self._encode(key, value))
        self._before = self._state
        self._state = _State(form, parts, padding, origin)
        return Cached(*self._decode(form, parts), None, padding)

    def _appended(self, new: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The parts of all tokens.

        Where they move to more room, a part has left its old memory before the next one moves.
        """
        if self._state is None:
            return tuple(growth.append(None, part) for part in new)
        # What was there earlier would keep the old memory.
        self._before = None
        parts = []
        try:
            for number, part in enumerate(new):
                parts.append(growth.append(self._state.parts[number], part))
                self._state = self._state.moved(number, parts[number])
        except BaseException:
            for part, _ in zip(self._state.parts, parts, strict=False):
                growth.reclaim(part, self.length)
            self._before = self._state
            raise
        return tuple(parts)

    def take_back(self) -> None:
        """See `Cache`."""
        self._state = self._before
        self._reclaim()

    def reorder(self, index: Tensor) -> None:
        """See `DecodingCache`."""
        if self._state is not None:
            form = self._state.form
            self._take(checks.reorder_index(index, form.batch, form.device))

    def select(self, rows: Tensor) -> None:
        """See `DecodingCache`."""
        if self._state is not None:
            form = self._state.form
            self._take(checks.select_index(rows, form.batch, form.device))

    def _take(self, index: Tensor) -> None:
        assert self._state is not None
        form, parts, *rows = self._state
        self._state = _State(
            form._replace(batch=len(index)),
            tuple(growth.take(part, index) for part in parts),
            *(None if tensor is None else tensor.index_select(0, index) for tensor in rows),
        )
        # What was there would keep its memory.
        self._before = self._state

    def crop(self, length: int) -> None:
        """See `DecodingCache`."""
        length = checks.check_crop(length, self.length)
        if self._state is not None:
            form, parts, padding, origin = self._state
            self._state = _State(
                form,
                tuple(part.narrow(2, 0, length) for part in parts),
                None if padding is None else padding[:, :length],
                origin,
            )
            self._reclaim()

    def fork(self) -> None:
        """See `DecodingCache`."""
        self._forks.open(self._state)

    def commit(self) -> None:
        """See `DecodingCache`."""
        self._forks.close("commit")

    def rollback(self) -> None:
        """See `DecodingCache`."""
        self._state = self._before = self._forks.close("rollback")
        self._reclaim()

    def _reclaim(self) -> None:
        """Let tokens that neither the present state nor an open fork has be written over."""
        if self._state is None:
            return
        for number, part in enumerate(self._state.parts):
            length = part.shape[2]
            for kept in self._forks.states:
                if kept is not None and kept.parts[number]._base is part._base:
                    length = max(length, kept.length)
            growth.reclaim(part, length)

    def reset(self) -> None:
        """See `DecodingCache`."""
        self._state = self._before = None
        self._forks.clear()

    @property
    def nbytes(self) -> int:
        """See `DecodingCache`."""
        if self._state is None:
            return 0
        padding = self._state.padding
        held = sum(growth.nbytes(part) for part in self._state.parts)
        return held + (0 if padding is None else padding.nbytes)

    def state_dict(self) -> dict[str, Any]:
        """See `DecodingCache`."""
        found: dict[str, Any] = dict.fromkeys(self._state_names())
        found[checks.KIND] = type(self).__name__
        if self._state is not None:
            form, parts, padding, origin = self._state
            found["form"] = tuple(form[:5])
            found["padding"] = None if padding is None else padding.clone()
            found["origin"] = None if origin is None else origin.clone()
            for name, part in zip(self._part_names, parts, strict=True):
                found[name] = part.clone(memory_format=torch.contiguous_format)
        return found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `DecodingCache`."""
        checks.check_state(state, type(self).__name__, self._state_names())
        self._state = self._before = None if state["form"] is None else self._loaded(state)
        self._forks.clear()

    def _state_names(self) -> set[str]:
        return {"form", "padding", "origin", *self._part_names}

    def _loaded(self, state: dict[str, Any]) -> _State:
        first = state[self._part_names[0]]
        device = first.device if isinstance(first, Tensor) else torch.device("cpu")
        form = Form(*sizes_of(state), device)
        length, parts = -1, []
        for name, (size, dtype) in zip(self._part_names, self._part_forms(form), strict=True):
            shape = (form.batch, form.heads, length, size)
            part = checks.state_tensor(name, state[name], shape, dtype)
            length = part.shape[2]
            parts.append(growth.append(None, part))
        padding, origin = (
            None if tensor is None else tensor.clone()
            for tensor in (padding_of(state, form.batch, length), origin_of(state, form.batch))
        )
        return _State(form, tuple(parts), padding, origin)

    def to(self, device: torch.device | str) -> Self:
        """See `DecodingCache`."""
        target = placed(device)
        self._state = _moved(self._state, target)
        self._forks.states = [_moved(state, target) for state in self._forks.states]
        return self


def _moved(state: _State | None, device: torch.device) -> _State | None:
    if state is None or state.form.device == device:
        return state
    parts = tuple(part.to(device) for part in state.parts)
    rows = (None if t is None else t.to(device) for t in (state.padding, state.origin))
    return _State(state.form._replace(device=device), parts, *rows)
