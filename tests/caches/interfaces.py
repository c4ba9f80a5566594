"""Caches of every kind with three tokens in them, and tokens to give them."""

import torch
from torch import Tensor

import zeta
from tests.caches.histories import HEAD_DIM, VALUE_DIM
from tests.caches.kinds import KINDS
from zeta import masks
from zeta.caches import Cached, CrossCache, DecodingCache

NAMES = [name for name in KINDS if name != "dict"]


def tokens(
    count: int, *, batch: int = 2, heads: int = 2, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    key = torch.randn(batch, heads, count, HEAD_DIM, dtype=dtype)
    return key, torch.randn(batch, heads, count, VALUE_DIM, dtype=dtype)


def filled(name: str) -> DecodingCache:
    cache = KINDS[name].make(2)
    padding = torch.tensor([[True, False, False], [False, True, False]])
    cache.update(*tokens(3), padding)
    return cache


def cross() -> CrossCache:
    cache = CrossCache()
    cache.update(*tokens(3))
    return cache


def attend(query: Tensor, cached: Cached, *, backend: str = "auto") -> Tensor:
    """Causal attention over what a cache gave back."""
    mask: masks.Mask = masks.Causal()
    if cached.padding is not None:
        mask = mask & masks.drop(cached.padding[:, None, None])
    return zeta.attention(
        query,
        cached.key,
        cached.value,
        mask=mask,
        query_positions=cached.query_positions,
        key_positions=cached.positions,
        backend=backend,
    )
