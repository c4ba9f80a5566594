"""`StaticCache` in compiled functions: one graph for every length, beside eager steps."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from tests.caches.interfaces import attend, tokens
from zeta.caches import DecodingCache, DynamicCache, StaticCache
from zeta.nn import MultiheadAttention


@pytest.mark.parametrize("padded", [False, True])
def test_one_graph_for_prefill_and_one_for_every_later_step(padded: bool) -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    key, value = tokens(12)
    query = torch.randn(2, 4, 12, 6, dtype=torch.float64)
    padding = torch.zeros(2, 12, dtype=torch.bool)
    padding[0, :2] = padded

    def step(cache: DecodingCache, q: Tensor, k: Tensor, v: Tensor, new: Tensor | None) -> Tensor:
        return attend(q, cache.update(k, v, new), backend="reference")

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    static, dynamic = StaticCache(16), DynamicCache()
    sizes = [5, *[1] * 7]
    parts = [x.split(sizes, dim=2) for x in (query, key, value)]
    paddings = padding.split(sizes, dim=1) if padded else [None] * len(sizes)
    for part in zip(*parts, paddings, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(compiled(static, *part), step(dynamic, *part))
    assert counter.frame_count == 2
    assert static.length == 12
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("xpos", [False, True])
def test_a_generation_through_the_module_compiles_twice(xpos: bool) -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    config = {"xpos_rel_pos": xpos}
    attention = MultiheadAttention(config, 16, 2, self_attention=True).double().eval()
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    cache = StaticCache(16)

    def step(part: Tensor) -> Tensor:
        return attention(part, part, part, cache, is_causal=True, need_weights=False)[0]

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    with torch.no_grad():
        whole = attention(x, x, x, is_causal=True, need_weights=False)[0]
        found = torch.cat([compiled(part) for part in x.split([4, *[1] * 8], dim=1)], dim=1)
        torch.testing.assert_close(found, whole)
        assert counter.frame_count == 2
        cache.reset()
        again = torch.cat([compiled(part) for part in x.split([4, *[1] * 8], dim=1)], dim=1)
        torch.testing.assert_close(again, whole)
    # The memory that is there after a reset is a third case: prefill without allocating.
    assert counter.frame_count <= 3
    torch.compiler.reset()


def test_a_compiled_step_counts_from_where_the_eager_ones_did() -> None:
    torch.compiler.reset()
    config = {"xpos_rel_pos": True, "xpos_scale_base": 2}
    attention = MultiheadAttention(config, 16, 2, self_attention=True).double().eval()
    x = torch.randn(2, 8, 16, dtype=torch.float64)
    at = torch.arange(5) - torch.tensor([[2], [0]])
    caches = StaticCache(16), StaticCache(16)

    def step(cache: StaticCache, part: Tensor, positions: Tensor | None) -> Tensor:
        options = {"is_causal": True, "need_weights": False, "positions": positions}
        return attention(part, part, part, cache, **options)[0]

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    with torch.no_grad():
        for cache in caches:
            step(cache, x[:, :5], at)
        for part in x[:, 5:].split(1, dim=1):
            found, expected = (
                f(c, part, None) for f, c in zip((compiled, step), caches, strict=True)
            )
            torch.testing.assert_close(found, expected)
        # Of new sequences nobody says that they begin elsewhere.
        for cache in caches:
            cache.crop(0)
        found, expected = (
            f(c, x[:, :1], None) for f, c in zip((compiled, step), caches, strict=True)
        )
        torch.testing.assert_close(found, expected)
    torch.compiler.reset()


def test_a_compiled_step_on_a_full_cache_fails_and_writes_nothing() -> None:
    torch.compiler.reset()
    cache = StaticCache(3).allocate(2, 2, 6, value_dim=5, dtype=torch.float64)
    key, value = tokens(4)
    step = torch.compile(lambda k, v: cache.update(k, v).key.sum(), backend="eager")
    step(key[:, :, :3], value[:, :, :3])
    with pytest.raises(RuntimeError, match="a StaticCache is full"):
        step(key[:, :, 3:], value[:, :, 3:])
    assert cache.length == 3
    assert torch.equal(cache.state_dict()["key"], key[:, :, :3])
    torch.compiler.reset()


def test_a_compiled_step_is_not_taken_back() -> None:
    torch.compiler.reset()
    cache = StaticCache(8)
    cache.update(*tokens(3))
    step = torch.compile(lambda k, v: cache.update(k, v).key.sum(), backend="eager")
    step(*tokens(1))
    cache.take_back()
    assert cache.length == 4
    torch.compiler.reset()


def test_sequences_are_reordered_within_one_graph() -> None:
    torch.compiler.reset()
    cache = StaticCache(8)
    key, value = tokens(3)
    cache.update(key, value)
    step = torch.compile(lambda index: cache.reorder(index), backend="eager", fullgraph=True)
    step(torch.tensor([1, 1]))
    assert torch.equal(cache.state_dict()["key"], key[[1, 1]])
    torch.compiler.reset()


def test_compiled_and_eager_steps_mix() -> None:
    torch.compiler.reset()
    static, dynamic = StaticCache(16), DynamicCache()
    step = torch.compile(lambda k, v: static.update(k, v).key.sum(), backend="eager")
    for number, count in enumerate([3, 1, 1, 2, 1, 1]):
        key, value = tokens(count)
        if number % 2:
            step(key, value)
        else:
            static.update(key, value)
        dynamic.update(key, value)
        assert static.length == dynamic.length
        assert torch.equal(static.state_dict()["value"], dynamic.state_dict()["value"])
    torch.compiler.reset()
