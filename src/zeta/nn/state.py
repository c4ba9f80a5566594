"""From ``incremental_state``, a plain dict or a cache of `zeta.caches`, to a cache."""

from collections.abc import Callable, MutableMapping
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor

from zeta.caches import Cache, CrossCache, DictCache
from zeta.nn.anchors import rotate_earlier
from zeta.nn.positions import Rotation, XPos

IncrementalState: TypeAlias = MutableMapping[str, Any] | Cache | CrossCache


def open_state(
    state: IncrementalState,
    cross: bool,
    is_first_step: bool,
    rotation: Rotation | None,
) -> Cache | CrossCache:
    """The cache that an ``incremental_state`` is.

    Args:
        state: A dict, which the cache writes to, or a cache.
        cross: Whether it is for the keys of an encoder.
        is_first_step: The caller's belief that nothing is cached. Nothing depends on it: a cache
            knows.
        rotation: The attention's, if it has one.

    Raises:
        TypeError: ``state`` is neither.
        ValueError: It is of another kind of attention, or not empty at the first step.
    """
    cache: Cache | CrossCache
    if isinstance(state, MutableMapping):
        cache = CrossCache(state) if cross else DictCache(state, _of_earlier(rotation))
    elif isinstance(state, CrossCache) if cross else _is_cache(state):
        cache = state
    else:
        kind = "a dict or a CrossCache" if cross else "a dict or a cache from zeta.caches"
        raise TypeError(f"incremental_state must be {kind}; got {type(state).__name__}")
    if is_first_step and cache.length:
        raise ValueError(
            f"is_first_step=True, but incremental_state holds {cache.length} tokens; pass a new one"
        )
    return cache


def _is_cache(state: object) -> bool:
    # Asked so for speed: `isinstance` of a protocol takes longer than a short attention.
    return hasattr(state, "next_positions") and not isinstance(state, type)


def _of_earlier(rotation: Rotation | None) -> Callable[[Tensor], Tensor] | None:
    """How the keys of the first tokens are rotated, if they are."""
    if rotation is None:
        return None
    if isinstance(rotation, XPos):
        return partial(rotate_earlier, rotation)
    return partial(rotation.keys, positions=0)
