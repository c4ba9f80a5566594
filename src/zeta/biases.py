"""Biases as values: what is done to the scores before the softmax; ``+`` joins them in order.

A bias is a function of (batch, head, query position, key position); `Bucketed` and `Alibi` depend
only on the offset ``key position - query position`` and are never made into a ``T x S`` tensor on a
fast path: a kernel takes their `OffsetBias.offset_vector` instead.

Shape suffixes: B batch, H heads, T target length, S source length, N buckets, R offsets.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from zeta.positions import check_buckets, t5_buckets
from zeta.values import (
    Tile,
    Value,
    as_scores,
    broadcast_shape,
    check_device,
    check_flag,
    check_floating,
    check_integer,
    check_positive,
    check_scores_shape,
    kind,
    means,
    not_joined,
    python_number,
    wide_dtype,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Bias(Value):
    """Base of all biases."""

    def apply(self, scores: Tensor, tile: Tile) -> Tensor:
        """New scores of a tile, in the dtype of ``scores``."""
        raise NotImplementedError

    def __add__(self, other: "Bias") -> "Bias":
        if not isinstance(other, Bias):
            return not_joined(other, "a bias joins biases; of a tensor biases.Dense makes one")
        return Sum(summands(self) + summands(other))


def summands(bias: Bias | None) -> tuple[Bias, ...]:
    """The biases in the order in which they are applied; none for None."""
    if bias is None:
        return ()
    return bias.terms if means(bias, Sum) else (bias,)


@dataclasses.dataclass(frozen=True, eq=False)
class Additive(Bias):
    """Base of the biases that are added to the scores."""

    def values(self, tile: Tile) -> Tensor:
        """What is added, broadcastable to the tile's scores."""
        raise NotImplementedError

    def apply(self, scores: Tensor, tile: Tile) -> Tensor:
        return scores + self.values(tile).to(scores.dtype)

    def dense(self, batch: int, heads: int, target: int, source: int) -> Tensor:
        """The bias as a ``(B, H, T, S)`` tensor. For looking and for tests."""
        device = self.device()
        self.check(batch, heads, target, source, device)
        tile = Tile.whole(target, source, device=device)
        return self.values(tile).expand(batch, heads, target, source)


@dataclasses.dataclass(frozen=True, eq=False)
class Dense(Additive):
    """A tensor added to the scores, by index. It gets its gradient in its own shape.

    Args:
        tensor: Floating point, broadcastable to ``(batch, heads, target, source)``. ``-inf`` hides
            a key.

    Raises:
        TypeError: If it is not floating point.
        ValueError: If it has more than four dimensions.
    """

    tensor: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.tensor, Tensor) or not self.tensor.is_floating_point():
            raise TypeError(
                "biases.Dense takes a floating-point tensor (a bool one is a mask); "
                f"got {kind(self.tensor)}"
            )
        object.__setattr__(self, "tensor", as_scores("biases.Dense", self.tensor))

    def check(self, batch: int, heads: int, target: int, source: int, device: torch.device) -> None:
        check_scores_shape("biases.Dense", self.tensor.shape, batch, heads, target, source)
        check_device("biases.Dense", self.tensor, device)

    def shape(self, batch: int, heads: int, target: int, source: int) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def values(self, tile: Tile) -> Tensor:
        return tile.cut(self.tensor)


@dataclasses.dataclass(frozen=True, eq=False)
class OffsetBias(Additive):
    """Base of the biases that depend on a head and on ``key position - query position`` alone."""

    def shape(self, batch: int, heads: int, target: int, source: int) -> tuple[int, ...]:
        return 1, heads, target, source

    def reach(self, longest: int) -> int:
        """A distance, at most the ``longest`` there is, beyond which the bias no longer changes."""
        raise NotImplementedError

    def at(self, offset: Tensor) -> Tensor:
        """The bias at integer offsets of shape ``(...)``: ``(..., H)``, differentiable."""
        raise NotImplementedError

    def offset_vector(self, reach: int, device: torch.device | None = None) -> Tensor:
        """``(H, 2 * reach + 1)``: the bias at offsets ``-reach .. reach``, differentiable.

        On ``device``, by default that of its tensors.

        With ``reach = self.reach(longest)`` the bias at any offset ``r`` is
        ``vector[h, clamp(r, -reach, reach) + reach]``.
        """
        offset_R = torch.arange(-reach, reach + 1, device=device or self.device())
        return self.at(offset_R).T

    def values(self, tile: Tile) -> Tensor:
        offset = (tile.key_position - tile.query_position)[:, 0]
        return self.at(offset)[..., tile.heads].permute(0, 3, 1, 2)


@dataclasses.dataclass(frozen=True, eq=False)
class Bucketed(OffsetBias):
    """The learned relative position bias of T5 (Raffel et al., 2020, section 2.1).

    Args:
        table: ``(num_buckets, heads)``, usually learned.
        bidirectional: Half of the buckets for keys after the query. Otherwise those all share
            bucket 0, which suits causal attention.
        max_distance: Distances from here on share the last bucket.

    Raises:
        TypeError: ``table`` is not floating point, ``bidirectional`` no flag, or ``max_distance``
            no integer.
        ValueError: The table has too few buckets, or they reach no further than the exact ones.
    """

    table: Tensor
    bidirectional: bool = dataclasses.field(default=True, kw_only=True)
    max_distance: int = dataclasses.field(default=128, kw_only=True)

    def __post_init__(self) -> None:
        check_floating("table", self.table)
        check_flag("bidirectional", self.bidirectional)
        max_distance = check_integer("max_distance", self.max_distance)
        object.__setattr__(self, "max_distance", max_distance)
        if self.table.dim() != 2:
            raise ValueError(
                f"table must have shape (num_buckets, heads); got {tuple(self.table.shape)}"
            )
        check_buckets(self.table.shape[0], self.max_distance, bidirectional=self.bidirectional)

    def check(self, batch: int, heads: int, target: int, source: int, device: torch.device) -> None:
        if self.table.shape[1] != heads:
            raise ValueError(f"Bucketed table must have {heads} heads; got {self.table.shape[1]}")
        check_device("Bucketed table", self.table, device)

    def reach(self, longest: int) -> int:
        return min(self.max_distance, longest)

    def at(self, offset: Tensor) -> Tensor:
        buckets = t5_buckets(
            offset,
            bidirectional=self.bidirectional,
            num_buckets=self.table.shape[0],
            max_distance=self.max_distance,
        )
        # Widened first: a bucket's gradient is the sum over all offsets in it.
        return torch.nn.functional.embedding(buckets, self.table.to(wide_dtype(self.table.dtype)))


@dataclasses.dataclass(frozen=True, eq=False)
class Alibi(OffsetBias):
    """Attention with linear biases (Press et al., 2022): ``-slope * |query - key position|``.

    Args:
        slopes: ``(heads,)``, for example ``positions.alibi_slopes(heads)``.

    Raises:
        TypeError: They are not floating point.
        ValueError: They have another shape.
    """

    slopes: Tensor

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.at is not Alibi.at and cls.apply is Alibi.apply:
            cls.apply = Additive.apply  # type: ignore[method-assign]  # which asks `at`

    def __post_init__(self) -> None:
        check_floating("slopes", self.slopes)
        if self.slopes.dim() != 1:
            raise ValueError(f"slopes must have shape (heads,); got {tuple(self.slopes.shape)}")

    def check(self, batch: int, heads: int, target: int, source: int, device: torch.device) -> None:
        if self.slopes.shape[0] != heads:
            raise ValueError(f"Alibi slopes must be for {heads} heads; got {self.slopes.shape[0]}")
        check_device("Alibi slopes", self.slopes, device)

    def reach(self, longest: int) -> int:
        return longest

    def apply(self, scores: Tensor, tile: Tile) -> Tensor:
        # As wide as the scores: products rounded to float32 would be errors beside float64.
        wide = torch.promote_types(self.slopes.dtype, scores.dtype)
        slopes_H11 = self.slopes.to(wide)[tile.heads, None, None]
        distance = (tile.key_position - tile.query_position).abs()
        return scores - (distance * slopes_H11).to(scores.dtype)

    def at(self, offset: Tensor) -> Tensor:
        wide = wide_dtype(self.slopes.dtype)
        return -offset.abs().unsqueeze(-1).to(wide) * self.slopes.to(wide)


@dataclasses.dataclass(frozen=True, eq=False)
class Softcap(Bias):
    """Keeps scores within the limit: ``limit * tanh(scores / limit)`` (Gemma 2, 2024, section 2).

    It acts on the scores as they are when its turn comes: ``Softcap(50) + Dense(t)`` caps, then
    adds.

    Args:
        limit: A number, not a tensor: it is not learned.

    Raises:
        TypeError: It is no number.
        ValueError: It is not positive, or infinite.
    """

    limit: float

    def __post_init__(self) -> None:
        check_positive("limit", self.limit)
        object.__setattr__(self, "limit", python_number(self.limit))

    def shape(self, batch: int, heads: int, target: int, source: int) -> tuple[int, ...]:
        return 1, 1, 1, 1

    def apply(self, scores: Tensor, tile: Tile) -> Tensor:
        return self.limit * torch.tanh(scores / self.limit)


@dataclasses.dataclass(frozen=True, eq=False)
class Sum(Bias):
    """Several biases, one after the other; what ``+`` makes."""

    terms: tuple[Bias, ...]

    def check(self, batch: int, heads: int, target: int, source: int, device: torch.device) -> None:
        for term in self.terms:
            term.check(batch, heads, target, source, device)

    def shape(self, batch: int, heads: int, target: int, source: int) -> tuple[int, ...]:
        return broadcast_shape(term.shape(batch, heads, target, source) for term in self.terms)

    def apply(self, scores: Tensor, tile: Tile) -> Tensor:
        for term in self.terms:
            scores = term.apply(scores, tile)
        return scores
