"""Prompts of several lengths, how each is continued without a cache, and caches for all of them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.caches.kinds import new_pool
from tests.generation.models import Toy
from zeta.caches import DecodingCache, DynamicCache, PagedCache, StaticCache

PROMPTS = [[1, 2, 3, 4, 5], [6, 1], [2, 5, 3]]


def padded(side: str) -> tuple[Tensor, Tensor]:
    longest = max(map(len, PROMPTS))
    tokens = torch.full((len(PROMPTS), longest), 99)
    for row, prompt in zip(tokens, PROMPTS, strict=True):
        where = slice(longest - len(prompt), None) if side == "left" else slice(len(prompt))
        row[where] = torch.tensor(prompt)
    padding = tokens == 99
    return tokens.masked_fill(padding, 0), padding


def greedily(model: Toy, prompt: Sequence[int], count: int, stops: Sequence[int] = ()) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        tokens.append(int(model.logits_after(tokens).argmax()))
        if tokens[-1] in stops:
            break
    return tokens[len(prompt) :]


def _paged() -> list[DecodingCache]:
    pool = new_pool(200, 3, head_dim=4, value_dim=4)
    return [PagedCache(pool), PagedCache(pool)]


CACHES: dict[str, Callable[[], list[DecodingCache]]] = {
    "dynamic": lambda: [DynamicCache(), DynamicCache()],
    "static": lambda: [StaticCache(40), StaticCache(40)],
    "paged": _paged,
}
