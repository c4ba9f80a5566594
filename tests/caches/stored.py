"""Caches whose keys and values are read where they lie, and the same ones gathered.

Shapes: B batch, H heads, G key heads, N new tokens, L tokens so far, D head dimension.
"""

import torch
from torch import Tensor

from zeta.caches import Cached, PagedCache, PagePool, QuantizedCache
from zeta.stored import Codes, Pages, StoredTensor

BATCH, HEADS, KEY_HEADS = 3, 4, 2
HEAD_DIM, VALUE_DIM = 24, 40
KINDS = ("pages", "ragged pages", "codes")
NUM_PAGES = 1400
"""For 3,000 tokens of each sequence, in pages of 7."""


def new_cache(
    kind: str, dtype: torch.dtype, *, page_size: int = 7, device: str = "cpu"
) -> PagedCache | QuantizedCache:
    if kind == "codes":
        return QuantizedCache()
    return PagedCache(
        PagePool(
            NUM_PAGES, page_size, num_kv_heads=KEY_HEADS, head_dim=HEAD_DIM, value_dim=VALUE_DIM,
            dtype=dtype, device=device,
        )
    )  # fmt: skip


def new_tokens(count: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Keys and values that are not about 0."""
    key = torch.randn(BATCH, KEY_HEADS, count, HEAD_DIM)
    value = torch.randn(BATCH, KEY_HEADS, count, VALUE_DIM)
    return (key + 0.5).to(device, dtype), (value - 1.5).to(device, dtype)


def filled(
    kind: str, dtype: torch.dtype, *, length: int = 300, device: str = "cpu"
) -> PagedCache | QuantizedCache:
    """A cache with tokens; ragged ones have ``length``, a third of it and none."""
    cache = new_cache(kind, dtype, device=device)
    padding = None
    if kind == "ragged pages":
        lengths = torch.tensor([length, length // 3, 0])
        padding = (torch.arange(length) >= lengths[:, None]).to(device)
    cache.update(*new_tokens(length, dtype, device), padding)
    return cache


def on_used_pages() -> PagedCache:
    """A float32 cache of ragged lengths whose pages held NaN for another before."""
    pool = PagePool(60, 7, num_kv_heads=KEY_HEADS, head_dim=HEAD_DIM, value_dim=VALUE_DIM)
    dirty = PagedCache(pool)
    key, value = new_tokens(100, torch.float32)
    dirty.update(key * torch.nan, value * torch.nan)
    dirty.reset()
    cache = PagedCache(pool)
    lengths = torch.tensor([100, 31, 0])
    cache.update(key, value, torch.arange(100) >= lengths[:, None])
    return cache


def is_read(cached: Cached) -> bool:
    """Whether anybody has looked at keys or values."""
    assert isinstance(cached.key, StoredTensor)
    assert isinstance(cached.value, StoredTensor)
    return cached.key.materialized or cached.value.materialized


def features(tensor: Tensor) -> Tensor:
    """What a `StoredTensor` stands for, in float64, by the description of its store."""
    assert isinstance(tensor, StoredTensor)
    store, width = tensor.store, tensor.shape[3]
    keys = slice(tensor.first, tensor.first + tensor.shape[2])
    if isinstance(store, Codes):
        codes = store.value if tensor.is_value else store.key
        steps = store.value_steps if tensor.is_value else store.key_steps
        places = torch.arange(codes.shape[3] - width, dtype=torch.float64)
        middle = (codes[..., width:] * 256**places).sum(-1, keepdim=True)
        return ((codes[..., :width] + middle) * steps.double().unsqueeze(-1))[:, :, keys]
    assert isinstance(store, Pages)
    pages = store.value if tensor.is_value else store.key
    joined = pages[store.table.long()].double().transpose(1, 2).flatten(2, 3)
    if store.lengths is not None:
        for row, length in zip(joined, store.lengths.tolist(), strict=True):
            row[:, length:] = 0
    return joined[:, :, keys]
