"""Masks as values: which keys a query may see. ``&`` joins them, both must allow; ``|``, either.

A mask is a predicate of (batch, head, query position, key position), never a ``T x S`` tensor until
somebody asks for `Mask.dense`. Positions count from the first cached key, and queries come last:
of ``S`` keys and ``T`` queries, query ``t`` stands at position ``S - T + t``.

Shape suffixes: B batch, H heads, T target length, S source length, L positions.
"""

import dataclasses
import functools
import operator
from typing import Any, cast

import torch
from torch import Tensor

from zeta.values import (
    Tile,
    Value,
    as_scores,
    broadcast_shape,
    check_device,
    check_integer,
    check_integers,
    check_lengths,
    check_scores_shape,
    kind,
    means,
    not_joined,
    signed,
)

Bound = int | None
"""A position, or None: unbounded."""

_JOINS_MASKS = "a mask joins masks; of a tensor masks.keep or masks.drop makes one"


@dataclasses.dataclass(frozen=True, eq=False)
class Mask(Value):
    """Base of all masks.

    A subclass with a `visible` of its own has the `key_bounds` and `covers` that it defines beside
    it, and no others.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.meaning is cls:
            # What a base promises of its own pairs may be false of these.
            for name in {"key_bounds", "covers"}.difference(vars(cls)):
                setattr(cls, name, getattr(Mask, name))

    def visible(self, tile: Tile) -> Tensor:
        """Bool, broadcastable to the tile's scores; True: the query sees the key."""
        raise NotImplementedError

    def shape(self, batch: int, heads: int, target: int, source: int) -> tuple[int, ...]:
        return 1, 1, target, source

    def key_bounds(self, first_query: int, last_query: int) -> tuple[Bound, Bound]:
        """Positions outside which these queries surely see no key, both inclusive."""
        return None, None

    def covers(self, first_query: int, last_query: int, first_key: int, last_key: int) -> bool:
        """Whether all of these queries surely see all of these keys, in every sequence."""
        return False

    def dense(self, batch: int, heads: int, target: int, source: int) -> Tensor:
        """The mask as a ``(B, H, T, S)`` bool tensor, True: visible. For looking and for tests."""
        self.check(batch, heads, target, source, self.device())
        tile = Tile.whole(target, source, device=self.device())
        return self.visible(tile).expand(batch, heads, target, source)

    def __and__(self, other: "Mask") -> "Mask":
        if not isinstance(other, Mask):
            return not_joined(other, _JOINS_MASKS)
        return AllOf(conjuncts(self) + conjuncts(other))

    def __or__(self, other: "Mask") -> "Mask":
        if not isinstance(other, Mask):
            return not_joined(other, _JOINS_MASKS)
        return AnyOf((self, other))

    def __bool__(self) -> bool:
        """Refused: ``and`` and ``or`` would silently keep one of two masks.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            "a mask is neither true nor false: join masks with & and |, and ask `mask is None`"
        )


def conjuncts(mask: Mask | None) -> tuple[Mask, ...]:
    """The masks that must all allow a pair, outermost ``&`` taken apart; none for None."""
    if mask is None:
        return ()
    return mask.terms if means(mask, AllOf) else (mask,)


@dataclasses.dataclass(frozen=True, eq=False)
class Causal(Mask):
    """A query sees itself and the keys before it: key position <= query position.

    With more keys than queries (a cache) the queries are the last positions::

        T = S = 4     T = 2, S = 4
        x . . .       x x x .
        x x . .       x x x x
        x x x .
        x x x x
    """

    def visible(self, tile: Tile) -> Tensor:
        return tile.key_position <= tile.query_position

    def key_bounds(self, first_query: int, last_query: int) -> tuple[Bound, Bound]:
        return None, last_query

    def covers(self, first_query: int, last_query: int, first_key: int, last_key: int) -> bool:
        return last_key <= first_query


@dataclasses.dataclass(frozen=True, eq=False)
class SlidingWindow(Mask):
    """A query sees itself and the ``size - 1`` positions before it; causal in itself.

    ``SlidingWindow(2)``, T = S = 4::

        x . . .
        x x . .
        . x x .
        . . x x

    Raises:
        TypeError: If ``size`` is no integer.
        ValueError: If it is below 1, or no int64 has it.
    """

    size: int

    def __post_init__(self) -> None:
        size = check_integer("size", self.size)
        if size < 1:
            raise ValueError(f"size must be at least 1, the query itself; got {size}")
        if size >= 2**63:
            raise ValueError(f"size must be below 2**63; got {size}")
        object.__setattr__(self, "size", size)

    def visible(self, tile: Tile) -> Tensor:
        distance = tile.query_position - tile.key_position
        return (distance >= 0) & (distance < self.size)

    def key_bounds(self, first_query: int, last_query: int) -> tuple[Bound, Bound]:
        return first_query - self.size + 1, last_query

    def covers(self, first_query: int, last_query: int, first_key: int, last_key: int) -> bool:
        return last_key <= first_query and first_key > last_query - self.size


@dataclasses.dataclass(frozen=True, eq=False)
class _OfLengths(Mask):
    """Base of masks that are told by a number of keys of each sequence."""

    lengths: Tensor

    def __post_init__(self) -> None:
        check_integers("lengths", self.lengths)
        object.__setattr__(self, "lengths", signed(self.lengths))

    def check(self, batch: int, heads: int, target: int, source: int, device: torch.device) -> None:
        check_lengths(f"{type(self).__name__} lengths", self.lengths, batch, device)

    def _are_known(self) -> bool:
        """Whether one may read them: no device is waited for, and no compiler has to guess."""
        return self.lengths.is_cpu and not torch.compiler.is_compiling()


@dataclasses.dataclass(frozen=True, eq=False)
class PrefixLM(_OfLengths):
    """Causal, and every query sees the first ``lengths[b]`` positions of its sequence.

    ``PrefixLM(lengths=[2])``, T = S = 4::

        x x . .
        x x . .
        x x x .
        x x x x

    Args:
        lengths: ``(batch,)`` integers.
    """

    def shape(self, batch: int, heads: int, target: int, source: int) -> tuple[int, ...]:
        return batch, 1, target, source

    def visible(self, tile: Tile) -> Tensor:
        length = self.lengths[tile.batches, None, None, None]
        return (tile.key_position <= tile.query_position) | (tile.key_position < length)

    def key_bounds(self, first_query: int, last_query: int) -> tuple[Bound, Bound]:
        if not self._are_known():
            return None, None
        return None, max(last_query, int(self.lengths.max()) - 1)

    def covers(self, first_query: int, last_query: int, first_key: int, last_key: int) -> bool:
        known = self._are_known()
        return last_key <= first_query or (known and last_key < int(self.lengths.min()))


@dataclasses.dataclass(frozen=True, eq=False)
class Documents(Mask):
    """Packed sequences: a token sees its own document. Not causal in itself: join with `Causal`.

    ``Documents(ids=[[0, 0, 1, 1]])``, T = S = 4::

        x x . .
        x x . .
        . . x x
        . . x x

    Args:
        ids: ``(batch, length)`` integers above ``-2**63``, the document of each position; all
            positions of queries and keys must lie below ``length``. A position before the first is
            of no document.
    """

    ids: Tensor

    def __post_init__(self) -> None:
        check_integers("ids", self.ids)
        if self.ids.dim() != 2:
            raise ValueError(f"ids must have shape (batch, length); got {tuple(self.ids.shape)}")

    def check(self, batch: int, heads: int, target: int, source: int, device: torch.device) -> None:
        if self.ids.shape[0] != batch or self.ids.shape[1] < max(target, source):
            raise ValueError(
                f"Documents ids must have shape ({batch}, {max(target, source)} or more); "
                f"got {tuple(self.ids.shape)}"
            )
        check_device("Documents ids", self.ids, device)

    def shape(self, batch: int, heads: int, target: int, source: int) -> tuple[int, ...]:
        return batch, 1, target, source

    def visible(self, tile: Tile) -> Tensor:
        query_id = self.at(tile.query_position[:, 0, :, 0], tile.batches)
        key_id = self.at(tile.key_position[:, 0, 0, :], tile.batches)
        return query_id[:, None, :, None] == key_id[:, None, None, :]

    def at(self, position: Tensor, batches: slice | None = None) -> Tensor:
        """The documents at ``(1 or batches, N)`` positions: ``(batches, N)`` int64, the least there
        is for none, before the first position.
        """
        ids_BL = self.ids if batches is None else self.ids[batches]
        # In a narrower dtype the least could be the id of a document.
        ids_BL = ids_BL.to(torch.int64)
        found_BN = ids_BL.gather(1, position.clamp(min=0).expand(ids_BL.shape[0], -1))
        return torch.where(position >= 0, found_BN, torch.iinfo(torch.int64).min)


@dataclasses.dataclass(frozen=True, eq=False)
class Padding(_OfLengths):
    """Only the first ``lengths[b]`` keys of sequence ``b`` are real; padding is hidden from all.

    ``Padding(lengths=[3])``, T = S = 4::

        x x x .
        x x x .
        x x x .
        x x x .

    A length of 0 hides every key: the output of such a row is 0.

    Args:
        lengths: ``(batch,)`` integers, the number of valid keys. For padding elsewhere than at the
            end use `drop` or `keep` with a tensor.
    """

    def shape(self, batch: int, heads: int, target: int, source: int) -> tuple[int, ...]:
        return batch, 1, 1, source

    def visible(self, tile: Tile) -> Tensor:
        return tile.key_position < self.lengths[tile.batches, None, None, None]

    def key_bounds(self, first_query: int, last_query: int) -> tuple[Bound, Bound]:
        if not self._are_known():
            return None, None
        return None, int(self.lengths.max()) - 1

    def covers(self, first_query: int, last_query: int, first_key: int, last_key: int) -> bool:
        return self._are_known() and last_key < int(self.lengths.min())


@dataclasses.dataclass(frozen=True, eq=False)
class Dense(Mask):
    """A bool tensor by index, True: visible. Made by `keep` and `drop`: the name says the polarity.

    Args:
        tensor: bool, broadcastable to ``(batch, heads, target, source)``.

    Raises:
        TypeError: If it is not a bool tensor.
        ValueError: If it has more than four dimensions.
    """

    tensor: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.tensor, Tensor) or self.tensor.dtype != torch.bool:
            raise TypeError(
                "a mask must be a bool tensor (a float one is a bias: biases.Dense); "
                f"got {kind(self.tensor)}"
            )
        if self.tensor.dim() != 4:
            object.__setattr__(self, "tensor", as_scores("a mask", self.tensor))

    def check(self, batch: int, heads: int, target: int, source: int, device: torch.device) -> None:
        check_scores_shape("a dense mask", self.tensor.shape, batch, heads, target, source)
        check_device("a dense mask", self.tensor, device)

    def shape(self, batch: int, heads: int, target: int, source: int) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def visible(self, tile: Tile) -> Tensor:
        return tile.cut(self.tensor)


def keep(tensor: Tensor) -> Dense:
    """A mask from a bool tensor whose True means: the query sees the key.

    Args:
        tensor: bool, broadcastable to ``(batch, heads, target, source)``.

    Raises:
        TypeError: If it is not a bool tensor.
        ValueError: If it has more than four dimensions.
    """
    return Dense(tensor)


def drop(tensor: Tensor) -> Dense:
    """A mask from a bool tensor whose True means: the key is hidden. Otherwise as `keep`."""
    return Dense(~keep(tensor).tensor)


@dataclasses.dataclass(frozen=True, eq=False)
class _Joined(Mask):
    """Base of masks that are made of others."""

    terms: tuple[Mask, ...]

    def check(self, batch: int, heads: int, target: int, source: int, device: torch.device) -> None:
        for term in self.terms:
            term.check(batch, heads, target, source, device)

    def shape(self, batch: int, heads: int, target: int, source: int) -> tuple[int, ...]:
        return broadcast_shape(term.shape(batch, heads, target, source) for term in self.terms)


@dataclasses.dataclass(frozen=True, eq=False)
class AllOf(_Joined):
    """Visible where every term allows it; what ``&`` makes."""

    def visible(self, tile: Tile) -> Tensor:
        return functools.reduce(operator.and_, (term.visible(tile) for term in self.terms))

    def key_bounds(self, first_query: int, last_query: int) -> tuple[Bound, Bound]:
        firsts, lasts = zip(
            *(t.key_bounds(first_query, last_query) for t in self.terms), strict=True
        )
        known_firsts = [bound for bound in firsts if bound is not None]
        known_lasts = [bound for bound in lasts if bound is not None]
        return max(known_firsts, default=None), min(known_lasts, default=None)

    def covers(self, first_query: int, last_query: int, first_key: int, last_key: int) -> bool:
        return all(t.covers(first_query, last_query, first_key, last_key) for t in self.terms)


@dataclasses.dataclass(frozen=True, eq=False)
class AnyOf(_Joined):
    """Visible where at least one term allows it; what ``|`` makes."""

    def visible(self, tile: Tile) -> Tensor:
        return functools.reduce(operator.or_, (term.visible(tile) for term in self.terms))

    def key_bounds(self, first_query: int, last_query: int) -> tuple[Bound, Bound]:
        firsts, lasts = zip(
            *(t.key_bounds(first_query, last_query) for t in self.terms), strict=True
        )
        first = None if None in firsts else min(cast("tuple[int, ...]", firsts))
        last = None if None in lasts else max(cast("tuple[int, ...]", lasts))
        return first, last

    def covers(self, first_query: int, last_query: int, first_key: int, last_key: int) -> bool:
        return any(t.covers(first_query, last_query, first_key, last_key) for t in self.terms)
