"""`RollingCache`: the last tokens, and possibly the first, in constant memory.

Shapes: B batch, G key heads, N new tokens, C slots, K tokens kept, L tokens so far, D head
dimension.
"""

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from zeta.caches import checks
from zeta.caches.forks import Forks
from zeta.caches.form import Form, following, placed
from zeta.caches.interface import Cached
from zeta.caches.padding import alike, extend_padding
from zeta.caches.ring import Ring
from zeta.caches.slots import Slots
from zeta.caches.states import STATE_NAMES, Tokens, dict_of, tokens_of
from zeta.values import check_integer, check_tensor

_NAMES = STATE_NAMES | {"length", "window", "sinks"}


class _State(NamedTuple):
    """What is kept of ``length`` tokens; its slots are not written to while a fork has them."""

    slots: Slots
    padding_BC: Tensor | None
    length: int
    origin: Tensor | None = None


class _Overwritten(NamedTuple):
    """What an update replaced: the state, and of its slots ``at`` the contents."""

    state: _State | None
    at: Tensor
    key: Tensor
    value: Tensor


class _Kept(NamedTuple):
    """An open fork.

    Attributes:
        state: What it goes back to.
        common: How many first tokens the present state has in common with it.
        outer: How many ``state`` has in common with each of the forks that it was opened inside of.
    """

    state: _State | None
    common: int
    outer: tuple[int, ...]


class RollingCache:
    """Exact sliding-window attention over a sequence of any length, in the memory of one window.

    A query sees itself and the ``window - 1`` tokens before it, and with ``sinks`` also the first
    ``sinks`` tokens (Xiao et al., Efficient Streaming Language Models with Attention Sinks, 2023),
    all at their true positions: what the full forward computes under ``SlidingWindow(window)``, or
    ``SlidingWindow(window) | Causal() & Padding(sinks)``. The cache itself hides the rest. Sinks
    are for an attention without a window of its own, which would hide them again.

    Once tokens are forgotten, keys come back in the order of their slots; masks and biases by
    index, which go by another order, do not fit then. A crop brings no forgotten token back, unless
    a fork that is open still has it.

    Args:
        window: Tokens that a query sees, itself included.
        sinks: First tokens that every later query sees.

    Raises:
        TypeError: One is no integer.
        ValueError: ``window`` is below 1 or ``sinks`` below 0.
    """

    def __init__(self, window: int, sinks: int = 0) -> None:
        window, sinks = check_integer("window", window), check_integer("sinks", sinks)
        if window < 1 or sinks < 0:
            raise ValueError(
                f"window must be at least 1 and sinks at least 0; got {window} and {sinks}"
            )
        self.window, self.sinks = window, sinks
        self._ring = Ring(window, sinks)
        self._state: _State | None = None
        self._before: _Overwritten | None = None
        self._forks: Forks[_Kept] = Forks()

    @property
    def length(self) -> int:
        """Tokens so far, the forgotten ones included."""
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
        """See `Cache`. Of a padding mask for all tokens, those of forgotten ones are not read."""
        form = Form.of(key, value)
        checks.check_no_gradient("RollingCache", key, value)
        state = self._state
        if state is None:
            state = _State(Slots.empty(form, self._ring.num_slots), None, 0)
        else:
            state.slots.form.check(form)
        first, added = state.length, key.shape[2]
        old_K = self._ring.positions_kept(first, form.device)
        new_N = torch.arange(first, first + added, device=form.device)
        padding = self._joined_padding(state, key_padding_mask, old_K, new_N)
        ordered = first <= self._ring.num_slots
        joined = None
        if added > 1:
            # Before they are written over: the first of the new queries still see them.
            old_key, old_value = state.slots.show(len(old_K))
            joined = Cached(
                torch.cat((old_key, key), dim=2),
                torch.cat((old_value, value), dim=2),
                None if ordered else torch.cat((old_K, new_N))[None],
                padding,
                None if ordered else new_N[None],
                self._ring.mask(form.batch, form.device),
            )
        at = self._ring.slots_of(new_N[-self._ring.num_slots :])
        old = state.slots
        contents = old.key.index_select(2, at), old.value.index_select(2, at)
        self._before = _Overwritten(self._state, at, *contents)
        written = self._written(state, key, value, padding, new_N)
        self._state = written._replace(origin=None if origin is None else origin.expand(form.batch))
        return self._kept_and_last() if joined is None else joined

    def _joined_padding(
        self, state: _State, new: Tensor | None, old_K: Tensor, new_N: Tensor
    ) -> Tensor | None:
        """The padding of the tokens that are kept, and of the new ones behind them."""
        batch, added = state.slots.form.batch, len(new_N)
        total = state.length + added
        if new is not None:
            check_tensor("key_padding_mask", new)
        if new is not None and new.shape == (batch, total):
            extend_padding(None, new, batch=batch, length=total, added=added)
            return new[:, torch.cat((old_K, new_N))]
        if new is not None and new.shape != (batch, added):
            # Which raises, and says so for a sequence that is all there.
            extend_padding(None, new, batch=batch, length=total, added=added)
        remembered = None if state.padding_BC is None else state.padding_BC[:, : len(old_K)]
        length = len(old_K) + added
        return extend_padding(remembered, new, batch=batch, length=length, added=added)

    def _written(
        self, state: _State, key: Tensor, value: Tensor, padding: Tensor | None, new_N: Tensor
    ) -> _State:
        """The state with the new tokens that stay in their slots."""
        added, total = len(new_N), state.length + len(new_N)
        slots = self._unshared(state)
        # The sinks among them, and the last window; no two of these share a slot.
        num_sinks = max(0, self.sinks - state.length)
        start = max(num_sinks, added - self.window)
        if total > self._ring.num_slots:
            slots.changed()
        parts = [slice(start, added)] if not num_sinks else [slice(num_sinks), slice(start, added)]
        for part in parts:
            at = self._ring.slots_of(new_N[part])
            slots.scatter(at, key[:, :, part], value[:, :, part])
        if padding is None:
            return _State(slots, None, total)
        num_kept = padding.shape[1] - added
        padding_BC = padding.new_zeros(padding.shape[0], self._ring.num_slots)
        padding_BC[:, :num_kept] = padding[:, :num_kept]
        for part in parts:
            padding_BC[:, self._ring.slots_of(new_N[part])] = padding[:, num_kept:][:, part]
        return _State(slots, padding_BC, total)

    def _unshared(self, state: _State) -> Slots:
        shared = any(
            kept.state is not None and kept.state.slots is state.slots
            for kept in self._forks.states
        )
        return state.slots.copy() if shared else state.slots

    def _kept_and_last(self) -> Cached:
        """What the last token sees: all that is kept."""
        assert self._state is not None
        slots, padding, length, _ = self._state
        num_kept = min(length, self._ring.num_slots)
        key, value = slots.show(num_kept)
        padding = None if padding is None else padding[:, :num_kept]
        if length == num_kept:
            return Cached(key, value, None, padding)
        device = slots.form.device
        positions = self._ring.positions_kept(length, device)[None]
        last = torch.full((1, 1), length - 1, device=device)
        return Cached(key, value, positions, padding, last)

    def take_back(self) -> None:
        """See `Cache`."""
        if self._before is None:
            return
        self._state, at, key, value = self._before
        self._before = None
        if self._state is not None:
            self._state.slots.scatter(at, key, value)
            self._state.slots.changed()

    def reorder(self, index: Tensor) -> None:
        """See `DecodingCache`."""
        if self._state is not None:
            form = self._state.slots.form
            self._take(checks.reorder_index(index, form.batch, form.device))

    def select(self, rows: Tensor) -> None:
        """See `DecodingCache`."""
        if self._state is not None:
            form = self._state.slots.form
            self._take(checks.select_index(rows, form.batch, form.device))

    def _take(self, index: Tensor) -> None:
        assert self._state is not None
        _, padding, length, origin = self._state
        self._state = _State(
            self._unshared(self._state).take(index),
            None if padding is None else padding.index_select(0, index),
            length,
            None if origin is None else origin.index_select(0, index),
        )
        self._before = None
        self._limit_common(0)

    def _limit_common(self, length: int) -> None:
        self._forks.states = [
            kept._replace(common=min(kept.common, length)) for kept in self._forks.states
        ]

    def crop(self, length: int) -> None:
        """See `DecodingCache`."""
        length = checks.check_crop(length, self.length)
        state = self._state
        if state is None or length == state.length:
            return
        # Tokens that the last query will see, but which later ones have been written over.
        start, stop = max(self.sinks, length - self.window), min(length, state.length - self.window)
        slots, padding, _, origin = state
        if start < stop:
            slots, padding = self._brought_back(state, start, stop)
        slots.changed()
        self._state = _State(slots, padding, length, origin)
        self._limit_common(length)

    def _brought_back(self, state: _State, start: int, stop: int) -> tuple[Slots, Tensor | None]:
        """The slots and padding with tokens ``start`` to ``stop``, which a fork must have."""
        for kept, common, _ in reversed(self._forks.states):
            if kept is None or common < stop or kept.length - self.window > start:
                continue
            slots = self._unshared(state)
            at = self._ring.slots_of(torch.arange(start, stop, device=slots.form.device))
            slots.scatter(at, kept.slots.key[:, :, at], kept.slots.value[:, :, at])
            padding = state.padding_BC
            if padding is not None:
                old = torch.zeros_like(padding) if kept.padding_BC is None else kept.padding_BC
                padding, old = alike(padding, old)
                is_back_C = torch.zeros(slots.num_slots, dtype=torch.bool, device=at.device)
                padding = torch.where(is_back_C.index_fill(0, at, True), old, padding)
            return slots, padding
        raise ValueError(
            f"length must leave the last {self.window} tokens, but tokens {start} to {stop - 1} "
            "are not there any more; call fork() before what may have to be cropped"
        )

    def fork(self) -> None:
        """See `DecodingCache`."""
        outer = tuple(kept.common for kept in self._forks.states)
        self._forks.open(_Kept(self._state, self.length, outer))

    def commit(self) -> None:
        """See `DecodingCache`."""
        self._forks.close("commit")

    def rollback(self) -> None:
        """See `DecodingCache`."""
        self._state, _, outer = self._forks.close("rollback")
        self._before = None
        pairs = zip(self._forks.states, outer, strict=True)
        self._forks.states = [kept._replace(common=common) for kept, common in pairs]

    def reset(self) -> None:
        """See `DecodingCache`."""
        self._state = self._before = None
        self._forks.clear()

    @property
    def nbytes(self) -> int:
        """See `DecodingCache`."""
        slots, padding, *_ = self._state or (None, None)
        return sum(held.nbytes for held in (slots, padding) if held is not None)

    def state_dict(self) -> dict[str, Any]:
        """See `DecodingCache`. Tokens are in the order of their slots."""
        tokens = None
        if self._state is not None:
            slots, padding, length, origin = self._state
            num_kept = min(length, self._ring.num_slots)
            padding = None if padding is None else padding[:, :num_kept]
            tokens = Tokens(slots.form, *slots.show(num_kept), padding, origin)
        state = dict_of("RollingCache", tokens)
        return state | {"length": self.length, "window": self.window, "sinks": self.sinks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `DecodingCache`. Window and sinks must be the same."""
        checks.check_state(state, "RollingCache", _NAMES)
        if (state["window"], state["sinks"]) != (self.window, self.sinks):
            raise ValueError(
                f"state must have window={self.window} and sinks={self.sinks}; "
                f"got {state['window']} and {state['sinks']}"
            )
        tokens, length = tokens_of(state), checks.state_count("length", state["length"])
        num_kept = 0 if tokens is None else tokens.key.shape[2]
        if num_kept != min(length, self._ring.num_slots):
            raise ValueError(f"state of length {length} must not hold {num_kept} tokens")
        self.reset()
        if tokens is not None:
            slots = Slots.empty(tokens.form, self._ring.num_slots)
            slots.write(0, tokens.key, tokens.value)
            padding = tokens.padding
            if padding is not None:
                room = self._ring.num_slots - num_kept
                padding = torch.cat((padding, padding.new_zeros(len(padding), room)), dim=1)
            origin = None if tokens.origin is None else tokens.origin.clone()
            self._state = _State(slots, padding, length, origin)

    def to(self, device: torch.device | str) -> Self:
        """See `DecodingCache`."""
        target = placed(device)
        self._state = _moved(self._state, target)
        states = self._forks.states
        self._forks.states = [kept._replace(state=_moved(kept.state, target)) for kept in states]
        return self


def _moved(state: _State | None, device: torch.device) -> _State | None:
    if state is None:
        return None
    slots, padding, length, origin = state
    padding, origin = (None if t is None else t.to(device) for t in (padding, origin))
    return _State(slots.to(device), padding, length, origin)
