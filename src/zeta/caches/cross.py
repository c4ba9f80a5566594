"""`CrossCache`: an encoder's keys, values and padding, projected once.

Shapes: B batch, G key heads, S source length, D head dimension.
"""

from collections.abc import Mapping, MutableMapping
from typing import Any, Self

import torch
from torch import Tensor

from zeta.caches import checks
from zeta.caches.dictionary import KEY, PADDING, QUERIES, ROTATED, STATIC, VALUE, check_dict
from zeta.caches.forks import Forks
from zeta.caches.interface import Cached
from zeta.caches.padding import check_padding, extend_padding, kept_padding
from zeta.values import check_integer


class CrossCache:
    """Keys and values that do not grow.

    What a decoder does to its other caches it can do to this one: sequences are reordered and
    selected, and a fork remembers them; only `crop` finds nothing to do but to count queries anew.

    Args:
        state: A dict to keep them in, as an ``incremental_state``; a new one by default.

    Raises:
        TypeError: It is no dict, or holds keys or values that are no tensors.
        ValueError: It holds only one of the two, or a self-attention's rotated keys.
    """

    def __init__(self, state: MutableMapping[str, Any] | None = None) -> None:
        self._state: MutableMapping[str, Any] = {} if state is None else state
        check_dict(self._state)
        if ROTATED in self._state:
            raise ValueError(
                "incremental_state holds the keys of a self-attention; "
                "give each attention its own dict"
            )
        self._forks: Forks[dict[str, Any]] = Forks()
        self._before: dict[str, Any] | None = None

    @property
    def length(self) -> int:
        """Source tokens; 0 before the first `update`."""
        key: Tensor | None = self._state.get(KEY)
        return 0 if key is None else key.shape[2]

    def update(self, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None) -> Cached:
        """Keep projected keys ``(B, G, S, D)`` and values, in place of any that are there; queries
        are counted from the first again."""
        batch, _, source, _ = key.shape
        padding = kept_padding(None, key_padding_mask, batch=batch, length=source, added=source)
        self._before = dict(self._state)
        self._state[KEY], self._state[VALUE] = key, value
        self._state[STATIC] = torch.ones(batch, dtype=torch.bool, device=key.device)
        self._state.pop(PADDING, None)
        self._state.pop(QUERIES, None)
        if padding is not None:
            self._state[PADDING] = padding
        return Cached(key, value, None, padding)

    def reuse(
        self, batch: int, source: int | None = None, key_padding_mask: Tensor | None = None
    ) -> Cached:
        """What `update` kept.

        Args:
            batch: Sequences of the call.
            source: Length of the source if the call brings it again.
            key_padding_mask: ``(B, S)``; by default the one that was kept.

        Raises:
            ValueError: The cache is for another batch size or another source.
        """
        self._before = None
        key, value = self._state[KEY], self._state[VALUE]
        length = key.shape[2]
        if key.dim() != 4 or key.shape[0] != batch:
            raise ValueError(
                f"incremental_state must hold keys of {batch} sequences; "
                f"got shape {tuple(key.shape)}"
            )
        if value.shape[2] != length:
            raise ValueError(
                f"incremental_state must hold as many values as keys; "
                f"got {value.shape[2]} and {length}"
            )
        if source is not None and source != length:
            raise ValueError(
                f"key must be None or have the length of the cached source, {length}; "
                f"got {source}. Give each attention, and each source, its own incremental_state"
            )
        padding = extend_padding(None, key_padding_mask, batch=batch, length=length, added=length)
        if padding is None:
            padding = self._state.get(PADDING)
            if padding is not None:
                check_padding(f"incremental_state[{PADDING!r}]", padding, batch, length)
        return Cached(key, value, None, padding)

    def take_back(self) -> None:
        """Undo the `update` of a call that has failed."""
        if self._before is not None:
            self._replace(self._before)
            self._before = None

    def next_queries(self, query: Tensor) -> Tensor:
        """Positions ``(B, T)`` of this call's queries ``(B, T, E)``, after those counted."""
        batch, target = query.shape[:2]
        at_T = torch.arange(target, device=query.device)
        next_B = self._state.get(QUERIES)
        return at_T.expand(batch, -1) if next_B is None else next_B[:, None] + at_T

    def count_queries(self, query: Tensor) -> None:
        """Count the queries of a call that was successful."""
        self._state[QUERIES] = self.next_queries(query)[:, -1] + 1

    def reorder(self, index: Tensor) -> None:
        """See `DecodingCache`."""
        if self.length:
            key = self._state[KEY]
            self._take(checks.reorder_index(index, key.shape[0], key.device))

    def select(self, rows: Tensor) -> None:
        """See `DecodingCache`."""
        if self.length:
            key = self._state[KEY]
            self._take(checks.select_index(rows, key.shape[0], key.device))

    def _take(self, index: Tensor) -> None:
        for name, tensor in list(self._state.items()):
            self._state[name] = tensor.index_select(0, index)

    def crop(self, length: int) -> None:
        """Keep the source; queries beyond the first ``length`` do not count any more.

        Raises:
            TypeError: ``length`` is no integer.
            ValueError: It is negative.
        """
        length = _checked_count("length", length)
        if QUERIES in self._state:
            self._state[QUERIES] = self._state[QUERIES].clamp(max=length)

    def drop(self, count: int) -> None:
        """Keep the source; the last ``count`` queries do not count any more.

        Raises:
            TypeError: ``count`` is no integer.
            ValueError: It is negative.
        """
        count = _checked_count("count", count)
        if QUERIES in self._state:
            self._state[QUERIES] = (self._state[QUERIES] - count).clamp(min=0)

    def fork(self) -> None:
        """See `DecodingCache`."""
        self._forks.open(dict(self._state))

    def commit(self) -> None:
        """See `DecodingCache`."""
        self._forks.close("commit")

    def rollback(self) -> None:
        """See `DecodingCache`."""
        self._replace(self._forks.close("rollback"))

    def reset(self) -> None:
        """See `DecodingCache`."""
        self._replace({})
        self._forks.clear()

    def _replace(self, state: Mapping[str, Any]) -> None:
        self._state.clear()
        self._state.update(state)

    @property
    def nbytes(self) -> int:
        """See `DecodingCache`."""
        return sum(tensor.nbytes for tensor in self._state.values())

    def state_dict(self) -> dict[str, Any]:
        """See `DecodingCache`."""
        tensors = {name: tensor.clone() for name, tensor in self._state.items()}
        return {checks.KIND: "CrossCache", "tensors": tensors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `DecodingCache`."""
        checks.check_state(state, "CrossCache", {"tensors"})
        tensors = state["tensors"]
        if not isinstance(tensors, Mapping) or not all(
            isinstance(tensor, Tensor) for tensor in tensors.values()
        ):
            raise ValueError(f"state['tensors'] must be a dict of tensors; got {tensors!r}")
        missing = {KEY, VALUE, STATIC} - set(tensors)
        if tensors and missing:
            raise ValueError(f"state['tensors'] must have {sorted(missing)} too")
        self._replace({name: tensor.clone() for name, tensor in tensors.items()})
        self._forks.clear()

    def to(self, device: torch.device | str) -> Self:
        """See `DecodingCache`."""
        self._replace({name: tensor.to(device) for name, tensor in self._state.items()})
        self._forks.states = [
            {name: tensor.to(device) for name, tensor in state.items()}
            for state in self._forks.states
        ]
        return self


def _checked_count(name: str, count: int) -> int:
    count = check_integer(name, count)
    if count < 0:
        raise ValueError(f"{name} must not be negative; got {count}")
    return count
