"""`StaticCache`: memory for a number of tokens that is set beforehand, at addresses that stay.

Shapes: B batch, G key heads, N new tokens, C = max_length, L tokens so far, D head dimension.
"""

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from zeta.caches import checks
from zeta.caches.captured import check_allocated, check_seen, replaced
from zeta.caches.forks import Forks
from zeta.caches.form import Form, following, placed
from zeta.caches.interface import Cached, CacheFullError
from zeta.caches.padding import extend_padding
from zeta.caches.recording import is_recorded
from zeta.caches.slots import Slots, own, own_on, own_or_none
from zeta.caches.states import STATE_NAMES, Tokens, dict_of, tokens_of
from zeta.values import check_size


class _Kept(NamedTuple):
    """What a fork goes back to; ``slots`` is None while the memory itself still has it."""

    num_tokens: Tensor | None
    slots: Slots | None
    padding: Tensor | None
    origin: Tensor | None

    def to(self, device: torch.device) -> "_Kept":
        slots = None if self.slots is None else self.slots.to(device)
        rows = (own_on(device, tensor) for tensor in (self.padding, self.origin))
        return _Kept(own_on(device, self.num_tokens), slots, *rows)


class StaticCache:
    """The cache for ``torch.compile`` and CUDA graphs, and where the longest length is known.

    Nothing is allocated or copied after the first step. The length is a tensor on the device: a
    traced or captured step gets all ``max_length`` slots back, the empty ones with position -1, and
    never waits for the device; so one graph does for every length. An eager step gets only the
    tokens that are there.

    A captured step reads padding, and the position from which xPos counts, where they were when it
    was captured. So the cache must have its memory by then, and padding or positions if any are to
    come: run the step with them first, and `crop` to 0, which keeps their place as `reset` does
    not.

    Args:
        max_length: Tokens it can hold.

    Raises:
        TypeError: ``max_length`` is no integer.
        ValueError: It is below 1.
    """

    def __init__(self, max_length: int) -> None:
        self.max_length = check_size("max_length", max_length)
        self._slots: Slots | None = None
        self._padding_BC: Tensor | None = None
        self._origin_B: Tensor | None = None
        # The length: on the device, and as far as the host knows it without asking; None: it must.
        self._count: Tensor | None = None
        self._known: int | None = 0
        # Whether a CUDA graph may add tokens: then the host never knows, and no tensor is replaced.
        self._captured = False
        # Length, padding and origin before an eager update that was the last; otherwise None.
        self._before: tuple[int, Tensor | None, Tensor | None] | None = None
        self._forks: Forks[_Kept] = Forks()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._captured = False
        if self._slots is not None:
            # What was copied in inference mode could only be written to there.
            self.to(self._slots.form.device)

    def allocate(
        self,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Take the memory now, as a CUDA graph needs it; otherwise the first `update` does.

        Returns:
            The cache itself.

        Raises:
            ValueError: It has memory already.
        """
        if self._slots is not None:
            raise ValueError("the cache has its memory already")
        target = placed(device)
        sizes = batch, num_kv_heads, head_dim, head_dim if value_dim is None else value_dim
        self._allocate(Form(*sizes, dtype, target))
        return self

    def _make_room(self, form: Form) -> Slots:
        """The memory there is; only while it is empty can it be of other sizes."""
        if self._slots is None or self._slots.form != form:
            return self._allocate(form)
        return self._slots

    def _allocate(self, form: Form) -> Slots:
        self._slots = slots = Slots.empty(form, self.max_length)
        self._padding_BC = self._origin_B = None
        self._captured = False
        self._count = own(torch.zeros((), dtype=torch.int64, device=form.device))
        if form.device.type == "cuda" and not torch.compiler.is_compiling():
            # Otherwise a compiled step would copy the cache into memory of its own graph.
            for tensor in (slots.key, slots.value, self._count):
                torch._dynamo.mark_static_address(tensor)
        return slots

    @property
    def length(self) -> int:
        """Tokens so far. After a compiled or captured step it is read from the device."""
        if self._known is not None:
            return self._known
        assert self._count is not None
        length = int(self._count)
        self._known = None if self._captured else length
        return length

    def next_positions(self, num_tokens: int, device: torch.device) -> Tensor:
        """See `Cache`."""
        if self._count is not None and is_recorded(self._count.device):
            return (self._count + torch.arange(num_tokens, device=device))[None]
        return following(self.length, num_tokens, device)

    def origin(self, first: Tensor | None) -> Tensor | None:
        """See `Cache`."""
        if self._count is not None and is_recorded(self._count.device):
            if first is None and self._origin_B is None:
                return None
            begun, kept = (0 if tensor is None else tensor for tensor in (first, self._origin_B))
            return torch.where(self._count == 0, begun, kept)
        return self._origin_B if self.length else first

    def update(
        self,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        *,
        origin: Tensor | None = None,
    ) -> Cached:
        """See `Cache`.

        In a traced or captured step a padding mask of all tokens is ``(B, max_length)``, and a full
        cache is an assertion that fails on the device.
        """
        slots = self._slots
        form = Form.of(key, value, None if slots is None else slots.form)
        checks.check_no_gradient("StaticCache", key, value)
        fixed = is_recorded(form.device)
        first, added = 0 if fixed else self.length, key.shape[2]
        if slots is not None and (fixed or first):
            slots.form.check(form)
        if fixed:
            return self._update_fixed(form, key, value, key_padding_mask, origin)
        total = first + added
        if total > self.max_length:
            raise CacheFullError(
                f"a StaticCache of max_length={self.max_length} holds {first} tokens and has no "
                f"room for {added} more"
            )
        known = None if self._padding_BC is None or not first else self._padding_BC[:, :first]
        padding = extend_padding(
            known, key_padding_mask, batch=form.batch, length=total, added=added
        )
        slots = self._make_room(form)
        self._check_captured(padding, origin)
        padding_BC, origin_B = self._padding_BC, self._origin_B
        self._before = first, own_or_none(padding_BC), own_or_none(origin_B)
        slots.write(first, key, value)
        if padding is not None:
            self._keep_padding(padding)
        if origin is not None:
            self._keep_origin(origin, form.batch)
        elif origin_B is not None:
            self._origin_B = replaced(origin_B, None, in_place=self._captured)
        self._set_length(total)
        return Cached(*slots.show(total), None, padding)

    def _update_fixed(
        self,
        form: Form,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        origin: Tensor | None,
    ) -> Cached:
        """`update` with shapes that do not depend on the length, and without knowing it."""
        if not torch.compiler.is_compiling():
            check_allocated(self._slots)
            self._captured = True
            self._check_captured(key_padding_mask, origin)
        slots = self._make_room(form)
        assert self._count is not None
        added = key.shape[2]
        at_N = self._count + torch.arange(added, device=form.device)
        message = "a StaticCache is full"
        if not torch.compiler.is_compiling():
            # With dynamic=True it is a variable, which no text can hold.
            message = f"a StaticCache of max_length={self.max_length} is full"
        torch._assert_async(self._count + added <= self.max_length, message)
        slots.scatter(at_N, key, value)
        self._pad_fixed(form, at_N, key_padding_mask)
        self._keep_origin(origin, form.batch)
        self._count.add_(added)
        self._known = self._before = None
        slot_C = torch.arange(self.max_length, device=form.device)
        positions_C = torch.where(slot_C < self._count, slot_C, -1)
        padding = self._padding_BC
        return Cached(slots.key, slots.value, positions_C[None], padding, at_N[None])

    def _pad_fixed(self, form: Form, at_N: Tensor, new: Tensor | None) -> None:
        if new is None:
            return
        if new.shape != (form.batch, self.max_length):
            # Checks it; nothing is remembered here.
            extend_padding(None, new, batch=form.batch, length=len(at_N), added=len(at_N))
        if self._padding_BC is None:
            self._padding_BC = new.new_zeros(form.batch, self.max_length)
        if self._padding_BC.dtype != new.dtype:
            raise TypeError(
                f"key_padding_mask must stay {self._padding_BC.dtype} under torch.compile; "
                f"got {new.dtype}"
            )
        if new.shape[1] == self.max_length:
            self._padding_BC.copy_(new)
        else:
            self._padding_BC.index_copy_(1, at_N, new)

    def _keep_origin(self, origin: Tensor | None, batch: int) -> None:
        if origin is None:
            return
        if self._origin_B is None:
            self._origin_B = own(origin.expand(batch))
        else:
            self._origin_B.copy_(origin)

    def _check_captured(self, padding: Tensor | None, origin: Tensor | None) -> None:
        if self._captured:
            check_seen(self._padding_BC, self._origin_B, padding, origin)

    def _put_rows(self, padding_BC: Tensor | None, origin_B: Tensor | None) -> None:
        self._padding_BC = replaced(self._padding_BC, padding_BC, in_place=self._captured)
        self._origin_B = replaced(self._origin_B, origin_B, in_place=self._captured)

    def _keep_padding(self, padding_BL: Tensor) -> None:
        batch, length = padding_BL.shape
        if self._padding_BC is None or self._padding_BC.dtype != padding_BL.dtype:
            self._padding_BC = own(padding_BL.new_zeros(batch, self.max_length))
        self._padding_BC[:, :length].copy_(padding_BL)

    def take_back(self) -> None:
        """See `Cache`. A step that is recorded leaves nothing to undo."""
        if self._before is not None:
            length, padding_BC, origin_B = self._before
            self._put_rows(padding_BC, origin_B)
            self._shorten(length)

    def reorder(self, index: Tensor) -> None:
        """See `DecodingCache`."""
        if self._slots is not None:
            form = self._slots.form
            self._take(checks.reorder_index(index, form.batch, form.device))

    def select(self, rows: Tensor) -> None:
        """See `DecodingCache`. Another number of sequences needs new memory, and a new graph."""
        if self._slots is not None:
            form = self._slots.form
            self._take(checks.select_index(rows, form.batch, form.device))

    def _take(self, index: Tensor) -> None:
        assert self._slots is not None
        self._back_up(self._slots, 0)
        slots, self._slots = self._slots, self._slots.take(index)
        self._captured = self._captured and self._slots is slots
        padding_BC, origin_B = (
            None if tensor is None else own(tensor.index_select(0, index))
            for tensor in (self._padding_BC, self._origin_B)
        )
        self._put_rows(padding_BC, origin_B)

    def _back_up(self, slots: Slots, length: int) -> None:
        """Copy the memory for the open forks that still need tokens from ``length`` on."""
        copy: Slots | None = None
        for number, kept in enumerate(self._forks.states):
            if kept.slots is None and kept.num_tokens is not None and kept.num_tokens > length:
                copy = copy or slots.copy()
                self._forks.states[number] = kept._replace(slots=copy)

    def crop(self, length: int) -> None:
        """See `DecodingCache`."""
        length = checks.check_crop(length, self.length)
        if self._slots is None or length == self.length:
            return
        self._back_up(self._slots, length)
        self._shorten(length)

    def fork(self) -> None:
        """See `DecodingCache`."""
        if self._known == 0:
            # Sequences that have no token yet may be others when it is gone back to.
            self._forks.open(_Kept(None, None, None, None))
            return
        count, *rows = map(own_or_none, (self._count, self._padding_BC, self._origin_B))
        self._forks.open(_Kept(count, None, *rows))

    def commit(self) -> None:
        """See `DecodingCache`."""
        self._forks.close("commit")

    def rollback(self) -> None:
        """See `DecodingCache`."""
        kept = self._forks.close("rollback")
        length = 0 if kept.num_tokens is None else int(kept.num_tokens)
        self._put_rows(*((kept.padding, kept.origin) if length else (None, None)))
        if self._slots is not None and kept.slots is not None:
            self._slots = slots = self._slots.restore(kept.slots)
            # A copy that forks share may be the memory now, which is written to.
            self._forks.states = [
                outer._replace(slots=None) if outer.slots is slots else outer
                for outer in self._forks.states
            ]
        self._shorten(length)

    def reset(self) -> None:
        """See `DecodingCache`. The memory is kept for sequences of the same sizes."""
        self._forks.clear()
        self._put_rows(None, None)
        self._shorten(0)

    def _set_length(self, length: int) -> None:
        self._known = None if self._captured else length
        if self._count is not None:
            self._count.fill_(length)

    def _shorten(self, length: int) -> None:
        self._set_length(length)
        if self._slots is not None:
            self._slots.clear_from(length)
        if self._padding_BC is not None:
            self._padding_BC[:, length:].zero_()

    @property
    def nbytes(self) -> int:
        """See `DecodingCache`."""
        padding = 0 if self._padding_BC is None else self._padding_BC.nbytes
        return padding + (0 if self._slots is None else self._slots.nbytes)

    def state_dict(self) -> dict[str, Any]:
        """See `DecodingCache`."""
        length, padding = self.length, self._padding_BC
        if self._slots is None or length == 0:
            return dict_of("StaticCache", None)
        padding = None if padding is None else padding[:, :length]
        shown = self._slots.show(length)
        tokens = Tokens(self._slots.form, *shown, padding, self._origin_B)
        return dict_of("StaticCache", tokens)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `DecodingCache`. ``max_length`` may be another, if the tokens fit."""
        checks.check_state(state, "StaticCache", STATE_NAMES)
        found = tokens_of(state)
        length = 0 if found is None else found.key.shape[2]
        if length > self.max_length:
            raise CacheFullError(
                f"state holds {length} tokens, too many for max_length={self.max_length}"
            )
        if found is not None and self._slots is not None and self._slots.form == found.form:
            self._check_captured(found.padding, found.origin)
        self.reset()
        if found is not None:
            with torch.inference_mode():
                self.update(found.key, found.value, found.padding, origin=found.origin)

    def to(self, device: torch.device | str) -> Self:
        """See `DecodingCache`."""
        target = placed(device)
        if self._slots is not None and self._slots.form.device != target:
            self._captured = False
        now = _Kept(self._count, self._slots, self._padding_BC, self._origin_B).to(target)
        self._count, self._slots, self._padding_BC, self._origin_B = now
        self._forks.states = [kept.to(target) for kept in self._forks.states]
        return self
