"""``copy.deepcopy``, ``pickle``, ``torch.save`` and ``state_dict``: equal, and independent."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ecosystem.layers import EMBED, HEADS, Layer, padding, tokens
from zeta.caches import (
    DynamicCache,
    PagedCache,
    PagePool,
    QuantizedCache,
    RollingCache,
    StaticCache,
)
from zeta.nn import ALiBi, MultiheadAttention, RotaryEmbedding, set_split_position

LAYERS: dict[str, Callable[[], Layer]] = {
    "documented": lambda: Layer(
        {"xpos_rel_pos": True}, subln=True, biased=True, causal=True, dropout=0.1
    ),
    "multiway": lambda: Layer({"multiway": 3}, subln=True, biased=True),
    "rotary, grouped": lambda: Layer(
        position=RotaryEmbedding(8), qk_norm="rms", num_kv_heads=2, window=4, bias=False
    ),
}


def saved(thing: Any, weights_only: bool = False) -> Any:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=weights_only)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "torch.save": saved,
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_a_copied_module(make: Callable[[], Layer], copied: Callable[[Any], Any]) -> None:
    layer = make().eval()
    layer.apply(set_split_position(4))
    inputs = tokens(), padding()
    expected = layer(*inputs)
    duplicate = copied(layer)
    assert torch.equal(duplicate(*inputs), expected)
    assert duplicate.state_dict().keys() == layer.state_dict().keys()
    duplicate(*inputs).sum().backward()
    assert all(parameter.grad is None for parameter in layer.parameters())
    with torch.no_grad():
        for parameter in duplicate.parameters():
            parameter.zero_()
    duplicate.apply(set_split_position(2))
    assert torch.equal(layer(*inputs), expected)


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_a_state_dict_goes_round(make: Callable[[], Layer]) -> None:
    layer, fresh = make().eval(), make().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.2)
    inputs = tokens(), padding()
    assert not torch.equal(fresh(*inputs), layer(*inputs))
    state = saved(layer.state_dict(), weights_only=True)
    assert fresh.load_state_dict(state, strict=True) == ([], [])
    assert torch.equal(fresh(*inputs), layer(*inputs))
    # On the meta device there is nothing but names and shapes.
    with torch.device("meta"):
        empty = make().eval()
    empty.load_state_dict(state, strict=True, assign=True)
    assert torch.equal(empty(*inputs), layer(*inputs))


def test_copies_keep_what_they_share() -> None:
    layer, alibi = Layer(), ALiBi(HEADS)
    shared = RotaryEmbedding(8)
    pair = torch.nn.ModuleList(
        MultiheadAttention(None, EMBED, HEADS, self_attention=True, position=shared)
        for _ in range(2)
    )
    pair[1].q_proj = pair[0].q_proj
    for copied in COPIES.values():
        duplicate = copied(pair)
        assert duplicate[0].xpos is duplicate[1].xpos is not shared
        assert duplicate[0].q_proj is duplicate[1].q_proj is not pair[0].q_proj
        assert torch.equal(copied(alibi).slopes, alibi.slopes)
        assert copied(layer).attention.scale == layer.attention.scale


CACHES: dict[str, Callable[[], Any]] = {
    "dict": dict,
    "dynamic": DynamicCache,
    "static": lambda: StaticCache(16),
    "rolling": lambda: RollingCache(16),
    "quantised": QuantizedCache,
    "paged": lambda: PagedCache(PagePool(32, 4, num_kv_heads=HEADS, head_dim=EMBED // HEADS)),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("make", CACHES.values(), ids=CACHES)
@torch.no_grad()
def test_decoding_goes_on_from_a_copied_cache(
    make: Callable[[], Any], copied: Callable[[Any], Any]
) -> None:
    torch.manual_seed(0)
    attention = MultiheadAttention(
        {"xpos_rel_pos": True}, EMBED, HEADS, self_attention=True, need_weights=False
    ).eval()

    def step(x: Tensor, cache: Any, hidden: Tensor | None = None) -> Tensor:
        out: Tensor = attention(x, x, x, cache, hidden, is_causal=True)[0]
        return out

    x, hidden = tokens(3, 10), torch.zeros(3, 6, dtype=torch.bool)
    hidden[1, :2] = True  # Padding on the left, which the cache remembers.
    cache = make()
    step(x[:, :6], cache, hidden)
    duplicate = copied(cache)
    expected = step(x[:, 6:], cache)
    assert torch.equal(step(x[:, 6:], duplicate), expected)
    # Each goes its own way.
    other = copied(cache)
    step(-x[:, :2], duplicate)
    assert torch.equal(step(x[:, :1], other), step(x[:, :1], cache))


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("make", CACHES.values(), ids=CACHES)
def test_a_cache_that_is_copied_in_inference_mode_goes_on_outside(
    make: Callable[[], Any], copied: Callable[[Any], Any]
) -> None:
    attention = MultiheadAttention(
        {"xpos_rel_pos": True}, EMBED, HEADS, self_attention=True, need_weights=False
    ).eval()
    x, hidden = tokens(3, 10), torch.arange(6) < torch.tensor([[0], [2], [1]])
    at = torch.arange(10) - hidden.sum(1, keepdim=True)

    def step(cache: Any, start: int, stop: int, hidden: Tensor | None = None) -> Tensor:
        part, positions = x[:, start:stop], at[:, start:stop]
        out, _ = attention(part, part, part, cache, hidden, is_causal=True, positions=positions)
        return out

    cache = make()
    with torch.inference_mode():
        step(cache, 0, 6, hidden)
        if not isinstance(cache, dict):
            cache.fork()
            step(cache, 6, 7)
        duplicate = copied(cache)
    with torch.no_grad():
        if not isinstance(cache, dict):
            for either in (cache, duplicate):
                either.crop(6)
                either.rollback()
        for size in (1, 3):
            assert torch.equal(step(duplicate, 6, 6 + size), step(cache, 6, 6 + size))


def pages(num_tokens: int, pool: PagePool, fill: int) -> PagedCache:
    cache = PagedCache(pool)
    cache.update(*torch.full((2, 1, HEADS, num_tokens, 4), float(fill)))
    return cache


@pytest.mark.parametrize("copied", [*COPIES.values(), copy.copy], ids=[*COPIES, "copy"])
def test_every_copy_of_a_paged_cache_gives_its_own_pages_back(
    copied: Callable[[Any], Any],
) -> None:
    pool = PagePool(12, 4, num_kv_heads=HEADS, head_dim=4)
    cache, other = pages(6, pool, 1), pages(9, pool, 2)
    cache.fork()
    cache.update(*torch.full((2, 1, HEADS, 3, 4), 3.0))
    before = cache.state_dict()
    duplicate = copied(cache)
    theirs = duplicate.pool
    assert (theirs is pool) == (copied is copy.copy)
    num_free = pool.num_free
    # The pages of a cache that was not copied are nobody's in a pool of the copy's own.
    assert theirs.num_free == num_free + (0 if theirs is pool else 3)
    duplicate.rollback()
    assert (duplicate.length, cache.length) == (6, 9)
    duplicate.reset()
    assert theirs.num_free == (num_free if theirs is pool else 12)
    pages(4 * theirs.num_free, theirs, 4)
    assert torch.equal(cache.state_dict()["key"], before["key"])
    cache.rollback()
    assert bool((cache.state_dict()["key"] == 1).all())
    cache.reset()
    other.reset()
    assert pool.num_free == 12


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_what_is_copied_together_shares_its_pages(copied: Callable[[Any], Any]) -> None:
    pool = PagePool(12, 4, num_kv_heads=HEADS, head_dim=4)
    first = pages(6, pool, 1)
    caches = copied([first, first.duplicate()])
    theirs = caches[0].pool
    assert theirs is caches[1].pool
    assert theirs.num_free == 10
    caches[0].update(*torch.full((2, 1, HEADS, 1, 4), 2.0))
    assert theirs.num_free == 9
    assert bool((caches[1].state_dict()["key"] == 1).all())


@pytest.mark.parametrize("copied", [*COPIES.values(), copy.copy], ids=[*COPIES, "copy"])
def test_a_pool_that_is_copied_alone_is_free(copied: Callable[[Any], Any]) -> None:
    pool = PagePool(3, 4, num_kv_heads=HEADS, head_dim=4)
    cache = pages(6, pool, 1)
    duplicate = copied(pool)
    assert (pool.num_free, duplicate.num_free) == (1, 3)
    pages(12, duplicate, 2)
    assert bool((cache.state_dict()["key"] == 1).all())


@pytest.mark.parametrize("copied", [*COPIES.values(), copy.copy], ids=[*COPIES, "copy"])
@pytest.mark.parametrize("used", [False, True])
def test_copied_weights_are_plain(copied: Callable[[Any], Any], used: bool) -> None:
    layer = Layer(biased=True, weights=True)
    inputs = tokens(), padding()
    expected = layer.attention(
        inputs[0], inputs[0], inputs[0], key_padding_mask=inputs[1], rel_pos=layer.bias,
        need_weights=True,
    )[1].detach()  # fmt: skip
    with torch.no_grad():
        _, weights = layer(*inputs)
    if used:
        weights.sum()
    duplicate = copied(weights)
    assert type(duplicate) is Tensor
    torch.testing.assert_close(duplicate, expected)


def test_weights_with_a_history_are_detached_first() -> None:
    _, weights = Layer(weights=True)(tokens())
    with pytest.raises(RuntimeError, match="Only Tensors created explicitly by the user"):
        copy.deepcopy(weights)
    assert torch.equal(copy.deepcopy(weights.detach()), weights)
