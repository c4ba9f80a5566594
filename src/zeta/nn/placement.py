"""Where the tokens of a call stand, which rotations and multiway modules ask.

Shapes: B batch, H heads, T target length, N source tokens of the call, D head dimension.
"""

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from zeta.caches import Cache, CrossCache, DictCache
from zeta.caches.recording import is_recorded
from zeta.nn.anchors import Rotated, rotate_xpos
from zeta.nn.multiway import Split
from zeta.nn.positions import Rotation, XPos
from zeta.nn.projections import called
from zeta.nn.tables import Positions, last_positions
from zeta.values import check_device, check_integers, check_positions_shape

SplitArgument: TypeAlias = Split | tuple[Split, Split]
"""One for queries and keys, or one for each."""


class Route(NamedTuple):
    """Which tokens go which way through multiway modules."""

    split: Split | None
    positions: Positions


def through(module: nn.Module, x: Tensor, route: Route | None) -> Tensor:
    """``module(x)``, along ``route`` if the module is multiway."""
    out: Tensor
    if route is None:
        out = called(module, x)
    else:
        out = module(x, split_position=route.split, token_positions=route.positions)
    return out


def batched_split(split: SplitArgument | None) -> SplitArgument | None:
    """The split of one sequence, with ``(T,)`` way ids, as that of a batch of one."""
    if isinstance(split, tuple):
        query_split, key_split = _pair(split)
        return _batched(query_split), _batched(key_split)
    return None if split is None else _batched(split)


def _pair(split: SplitArgument) -> tuple[Split, Split]:
    """The split of queries and that of keys."""
    if not isinstance(split, tuple):
        return split, split
    if len(split) != 2:
        raise ValueError(
            f"split_position must be one, or a pair: queries' and keys'; got {len(split)}"
        )
    return split


def _batched(split: Split) -> Split:
    return split.unsqueeze(0) if isinstance(split, Tensor) and split.dim() == 1 else split


class Placement(NamedTuple):
    """The tokens of one call.

    Attributes:
        first: Position of the first source token, the number of those in the cache; or of each,
            ``(1 or B, N)``, where ``positions`` are not those of the keys.
        positions: ``(T,)`` or ``(1 or B, T)``, given by the caller, or ``(1 or B, N)``, by the
            cache; None: tokens follow ``first``.
        given: Whether the caller gave them.
        query_route: None without multiway.
        key_route: None without multiway.
    """

    first: Positions
    positions: Tensor | None
    given: bool
    query_route: Route | None
    key_route: Route | None

    @classmethod
    def of(
        cls,
        query: Tensor,
        cache: Cache | CrossCache | None,
        positions: Tensor | None,
        split: SplitArgument | None,
        *,
        multiway: bool,
        rotates: bool,
        key: Tensor | None,
        keys_too: bool,
    ) -> "Placement":
        """Place the tokens of a call.

        Args:
            query: ``(B, T, E)``.
            cache: Of the call.
            positions: As given by the caller.
            split: As given by the caller.
            multiway: Whether the module is.
            rotates: Whether the module has a rotation.
            key: ``(B, N, kdim)``.
            keys_too: Whether ``positions`` are those of the keys as well.

        Raises:
            TypeError: ``positions`` are not integers.
            ValueError: Their shape or device is wrong, they are not as many as the keys, the
                module has no use for an argument, or there are more queries than keys beside a
                cache.
        """
        # Not asked with `isinstance(cache, Cache)`: a protocol takes microseconds to say no.
        given = positions is not None
        target = query.shape[1]
        # Keys of another shape are refused later.
        source = target if key is None or key.dim() != 3 else key.shape[1]
        follows = None if isinstance(cache, CrossCache) or not (rotates or multiway) else cache
        if positions is not None:
            if not (rotates or multiway):
                raise ValueError(
                    "positions was given, but the module has neither position= nor multiway"
                )
            positions = _checked_positions(positions, query, key if keys_too else None)
        first: Positions = 0
        if follows is not None and not (given and keys_too):
            if isinstance(follows, DictCache) or (target > source and not keys_too):
                first = follows.length
            elif target > source:
                raise ValueError(
                    "in a self-attention with a cache queries must be the last of the tokens; "
                    f"got {target} queries and {source} keys"
                )
            else:
                # Sequences may differ in length, or the device alone may know it.
                first = follows.next_positions(source, query.device)
                if keys_too:
                    positions, first = first, 0
        if not multiway:
            if split is not None:
                raise ValueError("split_position was given, but the module has no args.multiway")
            return cls(first, positions, given, None, None)
        key_at: Positions = first if positions is None or not keys_too else positions
        if follows is not None and not (given and keys_too):
            key_at = _steady(key_at, follows)
        query_at: Positions = key_at if positions is None or keys_too else positions
        if keys_too or (follows is not None and not given):
            query_at = last_positions(key_at, source - target)
        if positions is None and isinstance(cache, CrossCache):
            query_at = cache.next_queries(query)
        query_split, key_split = (None, None) if split is None else _pair(split)
        routes = Route(query_split, query_at), Route(key_split, key_at)
        return cls(first, positions, given, *routes)

    def rotate(
        self,
        rotation: Rotation,
        query: Tensor,
        key: Tensor,
        cache: Cache | None,
        *,
        keys_too: bool,
    ) -> Rotated:
        """Rotated queries ``(B, H, T, D)`` and new keys ``(B, G, N, D)``.

        Args:
            rotation: The module's.
            query: Its last token stands where the last key does, unless positions were given.
            key: The new keys.
            cache: Where they will be kept.
            keys_too: Whether the positions are those of the keys as well.

        Raises:
            ValueError: A position lies too far from where its token stands in the order.
        """
        if isinstance(rotation, XPos):
            at = self.first if self.positions is None else self.positions
            return rotate_xpos(rotation, query, key, cache, at, given=self.given)
        earlier = key.shape[2] - query.shape[2]
        if self.positions is None:
            key_at: Positions = self.first
            query_at = last_positions(key_at, earlier)
        elif keys_too:
            key_at, query_at = self.positions, last_positions(self.positions, earlier)
        else:
            key_at, query_at = self.first, self.positions
        if not earlier and (self.positions is None or keys_too):
            turned = rotation.pair(query, key, key_at)
        else:
            turned = rotation.queries(query, query_at), rotation.keys(key, key_at)
        return Rotated(*turned, None, None)


def _steady(positions: Positions, cache: Cache) -> Positions:
    """The positions of tokens that follow those in a cache, as the first if that says it all: then
    a way computes its own tokens only."""
    if not isinstance(positions, Tensor) or positions.shape[0] > 1:
        return positions
    return positions if is_recorded(positions.device) else cache.length


def _checked_positions(positions: Tensor, query: Tensor, keys: Tensor | None) -> Tensor:
    """As int64: differences of narrower integers would wrap around."""
    check_integers("positions", positions)
    check_positions_shape("positions", positions.shape, *query.shape[:2])
    check_device("positions", positions, query.device)
    # A key of another shape is refused later, whether there are positions or not.
    if keys is not None and keys.dim() == 3 and keys.shape[1] != query.shape[1]:
        raise ValueError(
            "positions must be those of queries and keys alike, which are one sequence; "
            f"got {query.shape[1]} queries and {keys.shape[1]} keys"
        )
    return positions.to(torch.int64)
