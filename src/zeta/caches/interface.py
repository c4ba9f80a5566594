"""What a key/value cache is: `Cache`, `DecodingCache`, and `Cached`, what they give back.

Shapes: B batch, G key heads, N new tokens, L keys that are given back, D head dimension.
"""

from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from zeta.masks import Mask


class CacheFullError(ValueError):
    """There is no room for the new tokens. The cache is as before: make room, and try again."""


class Cached(NamedTuple):
    """All keys and values that the new tokens may look at, their own included.

    They are valid until the cache is next written to: read them at once, or copy them. A cache that
    writes over what it gave back marks the tensors as changed, as any operation in place does.
    Where a cache keeps its tokens in another form, keys and values are made when they are first
    read: see `zeta.stored.StoredTensor`. After they were written over that is an error.

    Attributes:
        key: ``(B, G, L, D)``.
        value: ``(B, G, L, Dv)``.
        positions: ``(1 or B, L)`` int64, the position of each key, negative for an empty slot;
            None: 0 to L - 1.
        padding: ``(B, L)``, bool with True for padding, or floating point to add to the scores;
            None: no padding.
        query_positions: ``(1 or B, N)`` int64, the position of each new token; None: the last N of
            0 to L - 1.
        mask: What of these keys a query may see, by position, where the cache keeps only some of
            the tokens; None: all of them.
    """

    key: Tensor
    value: Tensor
    positions: Tensor | None
    padding: Tensor | None
    query_positions: Tensor | None = None
    mask: Mask | None = None


@runtime_checkable
class Cache(Protocol):
    """Keys and values of earlier tokens: what an attention needs of it.

    It alone knows how many there are. After any error it is what it was before the call.

    A cache may say two things more, which xPos asks: by ``wants_even_keys``, True, that no feature
    of a key should be far larger than the others; by ``max_length`` how many tokens a recorded
    step, which does for every length, has to do for.
    """

    @property
    def length(self) -> int:
        """Tokens so far: the position of the next one. The largest, if sequences differ in it."""
        ...

    def next_positions(self, num_tokens: int, device: torch.device) -> Tensor:
        """Positions ``(1 or B, num_tokens)`` int64 of the tokens that come next."""
        ...

    def origin(self, first: Tensor | None) -> Tensor | None:
        """From which position an attention whose keys decay counts those of these tokens.

        Args:
            first: ``(1 or B,)`` int64, where it would begin; None: at 0.

        Returns:
            What `update` was given with the last tokens; ``first`` if there are none yet.
        """
        ...

    def update(
        self,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        *,
        origin: Tensor | None = None,
    ) -> Cached:
        """Append tokens.

        Args:
            key: ``(B, G, N, D)``, rotated already where the attention rotates.
            value: ``(B, G, N, Dv)``.
            key_padding_mask: ``(B, N)`` for the new tokens, or ``(B, length)`` for all, which
                replaces what was remembered. bool, True for padding, or floating point, added to
                the scores.
            origin: ``(1 or B,)`` int64, kept for `origin`.

        Raises:
            ValueError: The tokens do not fit those that are there.
            CacheFullError: There is no room for them.
        """
        ...

    def take_back(self) -> None:
        """Undo the `update` that was just made: the call that it was for has failed."""
        ...


@runtime_checkable
class DecodingCache(Cache, Protocol):
    """A cache whose history can be changed: what a decoder needs besides.

    ``reorder``, ``select`` and ``crop`` say what the sequences now are; ``fork``, ``commit`` and
    ``rollback`` try something out; the others treat the cache as a value.
    """

    def reorder(self, index: Tensor) -> None:
        """Let sequence ``b`` continue what was sequence ``index[b]``: the step of a beam search.

        Args:
            index: ``(B,)`` int64. One on the CPU is checked without waiting for the device.

        Raises:
            TypeError: It is no tensor.
            ValueError: It is of another length, or out of range.
        """
        ...

    def select(self, rows: Tensor) -> None:
        """Keep these sequences, in this order: finished ones leave the batch, repeated ones
        multiply.

        Args:
            rows: ``(B',)`` int64, at least one; or ``(B,)`` bool, True for those that stay.

        Raises:
            TypeError: It is no tensor.
            ValueError: It is empty, of another shape or out of range.
        """
        ...

    def crop(self, length: int) -> None:
        """Forget all tokens but the first ``length``.

        Raises:
            TypeError: ``length`` is no integer.
            ValueError: There are fewer, or what would be left is not there any more.
        """
        ...

    def fork(self) -> None:
        """Remember the present state. Forks nest."""
        ...

    def commit(self) -> None:
        """Keep what happened since the last open fork, and close it.

        Raises:
            ValueError: No fork is open.
        """
        ...

    def rollback(self) -> None:
        """Return to the state of the last open fork, whatever happened since, and close it.

        Raises:
            ValueError: No fork is open.
        """
        ...

    def reset(self) -> None:
        """Forget everything, and close all forks."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes held, room for later tokens included, states of open forks apart."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The present state, in tensors of its own; open forks are not part of it."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state of the same kind of cache, and close all forks.

        Raises:
            ValueError: It is of another kind, or does not fit.
        """
        ...

    def to(self, device: torch.device | str) -> Self:
        """Move everything to a device; returns the cache itself."""
        ...
