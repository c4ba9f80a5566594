"""A call of the module that fails leaves its cache as it was, however far it got."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.caches.histories import same
from zeta import biases
from zeta.caches import (
    CrossCache,
    DecodingCache,
    DynamicCache,
    PagedCache,
    PagePool,
    QuantizedCache,
    RollingCache,
    StaticCache,
)
from zeta.nn import MultiheadAttention
from zeta.values import Tile

E, H, D = 8, 2, 4


def pool() -> PagePool:
    return PagePool(20, 2, num_kv_heads=H, head_dim=D)


CACHES: dict[str, Callable[[], DecodingCache]] = {
    "dynamic": DynamicCache,
    "static": lambda: StaticCache(16),
    "rolling": lambda: RollingCache(3),
    "rolling with sinks": lambda: RollingCache(2, 1),
    "paged": lambda: PagedCache(pool()),
    "quantized": QuantizedCache,
}


class Failing(biases.Bias):
    """A bias that is right until the scores are there."""

    def shape(self, batch: int, heads: int, target: int, source: int) -> tuple[int, ...]:
        return 1, 1, 1, 1

    def apply(self, scores: Tensor, tile: Tile) -> Tensor:
        raise RuntimeError("the bias fails")


FAILURES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "mask of another shape": ({"attn_mask": torch.zeros(9, 9)}, ValueError, "attn_mask must have"),
    "mask of another type": ({"attn_mask": "causal"}, TypeError, "attn_mask must be a tensor"),
    "bias of other heads": (
        {"rel_pos": biases.Alibi(torch.ones(3))},
        ValueError,
        "slopes must be for 2 heads",
    ),
    "bias that fails": ({"rel_pos": Failing()}, RuntimeError, "the bias fails"),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("added", [1, 2, 5])
@pytest.mark.parametrize("before", [0, 1, 5])
@pytest.mark.parametrize("kind", CACHES)
def test_the_cache_is_what_it_was(kind: str, before: int, added: int, failure: str) -> None:
    options, error, words = FAILURES[failure]
    attention = MultiheadAttention({"xpos_rel_pos": True}, E, H, self_attention=True).eval()
    cache, other = CACHES[kind](), CACHES[kind]()
    x = torch.randn(2, before + added, E)
    old, new = x[:, :before], x[:, before:]
    padding = torch.zeros(2, added, dtype=torch.bool)
    padding[0, 0] = True
    with torch.no_grad():
        for one in (cache, other):
            for token in old.split(1, dim=1) if before else ():
                attention(token, token, token, one, is_causal=True)
        cache.fork()
        was, length = cache.state_dict(), cache.length
        with pytest.raises(error, match=words):
            attention(new, new, new, cache, padding, is_causal=True, **options)
        assert same(was, cache.state_dict())
        assert cache.length == length
        found = attention(new, new, new, cache, is_causal=True)[0]
        assert torch.equal(found, attention(new, new, new, other, is_causal=True)[0])
        cache.rollback()
    assert same(was, cache.state_dict())


class Broken(torch.nn.Linear):
    """An output projection that fails, as one may that runs out of memory."""

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("the projection fails")


@pytest.mark.parametrize("kind", CACHES)
def test_the_cache_is_what_it_was_where_the_output_projection_fails(kind: str) -> None:
    attention = MultiheadAttention(None, E, H, self_attention=True).eval()
    cache, x = CACHES[kind](), torch.randn(2, 4, E)
    with torch.no_grad():
        attention(x, x, x, cache, is_causal=True)
        was = cache.state_dict()
        attention.out_proj = Broken(E, E)
        with pytest.raises(RuntimeError, match="the projection fails"):
            attention(x, x, x, cache, is_causal=True)
    assert same(was, cache.state_dict())
    assert cache.length == 4


def test_pages_of_a_failed_call_are_free_again() -> None:
    attention = MultiheadAttention(None, E, H, self_attention=True).eval()
    shared = pool()
    cache, x = PagedCache(shared), torch.randn(3, 4, E)
    with torch.no_grad():
        for _ in range(5):
            with pytest.raises(ValueError, match="attn_mask must have"):
                attention(x, x, x, cache, attn_mask=torch.zeros(9, 9))
            assert shared.num_free == shared.num_pages
        attention(x, x, x, cache)
        for _ in range(5):
            with pytest.raises(ValueError, match="attn_mask must have"):
                attention(x, x, x, cache, attn_mask=torch.zeros(9, 9))
            assert shared.num_free == shared.num_pages - 6


@pytest.mark.parametrize("failure", ["mask of another shape", "bias that fails"])
def test_a_cross_attention_forgets_the_source_of_a_failed_call(failure: str) -> None:
    options, error, words = FAILURES[failure]
    module = MultiheadAttention({"multiway": True}, E, H, encoder_decoder_attention=True).eval()
    x, source = torch.randn(2, 3, E), torch.randn(2, 4, E)
    cache = CrossCache()
    with torch.no_grad():
        with pytest.raises(error, match=words):
            module(x, source, source, cache, split_position=(1, 2), **options)
        assert (cache.length, cache.nbytes) == (0, 0)
        module(x, source, source, cache, split_position=(1, 2))
        was = cache.state_dict()["tensors"]
        for key in (None, source):
            with pytest.raises(error, match=words):
                module(x, key, key, cache, split_position=(1, 2), **options)
            assert same(was, cache.state_dict()["tensors"])
        with pytest.raises(ValueError, match="length of the cached source"):
            module(x, x, x, cache, split_position=(1, 2))
    assert same(was, cache.state_dict()["tensors"])
