"""`StaticCache`: addresses that stay, memory of its size, nothing left of what was cropped."""

import itertools

import pytest
import torch
from torch import Tensor

from tests.caches.histories import same
from tests.caches.interfaces import attend, tokens
from zeta.bench import peak_bytes
from zeta.caches import DynamicCache, StaticCache
from zeta.caches import static as static_module
from zeta.caches.slots import Slots
from zeta.nn import MultiheadAttention


def test_addresses_stay_whatever_happens() -> None:
    cache = StaticCache(8).allocate(2, 2, 6, value_dim=5, dtype=torch.float64)
    address = cache._slots.key.data_ptr()
    cache.update(*tokens(3))
    cache.fork()
    cache.reorder(torch.tensor([1, 0]))
    cache.update(*tokens(2))
    cache.crop(1)
    cache.rollback()
    cache.update(*tokens(1))
    cache.reset()
    cache.to("cpu").update(*tokens(1))
    assert cache._slots.key.data_ptr() == address
    with pytest.raises(ValueError, match="has its memory already"):
        cache.allocate(2, 2, 6)


@pytest.mark.parametrize("change", ["crop", "reorder"])
def test_forks_that_were_backed_up_together_are_apart_after_a_rollback(change: str) -> None:
    cache = StaticCache(8)
    cache.update(*tokens(3))
    before = cache.state_dict()
    cache.fork()
    cache.update(*tokens(2))
    cache.fork()
    cache.select(torch.tensor([0]))
    cache.rollback()
    if change == "crop":
        cache.crop(1)
    else:
        cache.reorder(torch.tensor([1, 0]))
    cache.update(*tokens(1))
    cache.rollback()
    assert same(cache.state_dict(), before)


def test_cropped_to_nothing_it_takes_another_batch_whatever_padding_was_there() -> None:
    cache, fresh = StaticCache(8), StaticCache(8)
    cache.update(*tokens(3), torch.tensor([[True, False, False], [False, False, False]]))
    cache.crop(0)
    new, padding = tokens(4, batch=3), torch.zeros(3, 4, dtype=torch.float64)
    padding[1, 0] = -torch.inf
    for held in (cache, fresh):
        held.update(*new)
        held.update(*(x[:, :, :2] for x in new), padding[:, :2])
    assert same(cache.state_dict(), fresh.state_dict())


def test_the_state_of_a_full_cache_is_a_copy_too() -> None:
    cache = StaticCache(3)
    cache.update(*tokens(3))
    before, state = cache.state_dict(), cache.state_dict()
    for name in ("key", "value"):
        state[name].zero_()
    assert same(before, cache.state_dict())


def test_a_fork_of_nothing_takes_another_batch_after_its_rollback() -> None:
    cache, fresh = StaticCache(8), StaticCache(8)
    padding = torch.tensor([[True, False], [False, False], [False, True]])
    cache.update(*tokens(2), padding[:2], origin=torch.tensor([4, 5]))
    cache.crop(0)
    cache.fork()
    cache.update(*tokens(2, batch=3), padding, origin=torch.tensor([4, 5, 6]))
    cache.rollback()
    new = tokens(2, batch=3)
    for held in (cache, fresh):
        held.update(*new, padding, origin=torch.tensor([7]))
    assert same(cache.state_dict(), fresh.state_dict())


def test_a_fork_copies_nothing_until_its_tokens_go(monkeypatch: pytest.MonkeyPatch) -> None:
    copies, copy = [], Slots.copy
    monkeypatch.setattr(Slots, "copy", lambda slots: copies.append(slots) or copy(slots))
    cache = StaticCache(8)
    cache.update(*tokens(3))
    before = cache.state_dict()
    cache.fork()
    cache.fork()
    cache.update(*tokens(2))
    cache.crop(3)
    assert not copies
    cache.crop(2)
    assert len(copies) == 1
    for _ in range(2):
        cache.rollback()
        assert same(cache.state_dict(), before)


def test_it_holds_its_memory_and_no_more() -> None:
    cache = StaticCache(4096)
    with torch.inference_mode():
        for _ in range(3):
            cache.update(*tokens(1))
    assert cache.nbytes == 2 * 2 * 4096 * (6 + 5) * 8
    cache.update(*tokens(1), torch.ones(2, 1, dtype=torch.bool))
    cache.reset()
    assert cache.nbytes == 2 * 2 * 4096 * (6 + 5) * 8


@pytest.mark.serial
def test_a_long_generation_allocates_little_more_than_its_cache() -> None:
    cache = StaticCache(4096)
    key = torch.randn(1, 4, 1, 64)
    with torch.inference_mode():
        cache.update(key, key)
        held = cache.nbytes
        with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
            for _ in range(4095):
                cache.update(key, key)
            seen = torch.empty(1 << 14).nbytes
    assert cache.length == 4096
    assert held == 2 * 4 * 4096 * 64 * 4
    changes = [
        event.nbytes()
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    assert seen in changes  # What is allocated is noticed.
    assert max(itertools.accumulate(changes)) <= 0.1 * held


def test_lazily_computed_weights_survive_later_steps() -> None:
    attention = MultiheadAttention(None, 16, 2, self_attention=True).double().eval()
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    for cache in (StaticCache(8), DynamicCache(), {}):
        with torch.no_grad():
            _, whole = attention(x, x, x, is_causal=True, need_weights=True)
            steps = [attention(p, p, p, cache, is_causal=True)[1] for p in x.split(2, dim=1)]
            for number, weights in enumerate(steps):
                rows = slice(2 * number, 2 * number + 2)
                expected = whole[:, :, rows, : rows.stop]
                torch.testing.assert_close(weights + 0, expected)


def test_what_was_written_over_is_not_read_in_silence() -> None:
    attention = MultiheadAttention(None, 16, 2, self_attention=True).double().eval()
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    for cache in (StaticCache(16), DynamicCache()):
        with torch.no_grad():
            attention(x, x, x, cache, is_causal=True)
            _, weights = attention(x[:, :1], x[:, :1], x[:, :1], cache, is_causal=True)
            cache.crop(3)
            attention(x, x, x, cache, is_causal=True, need_weights=False)
            with pytest.raises(RuntimeError, match="changed in place"):
                weights.sum()


@pytest.mark.gpu
def test_a_cuda_graph_decodes() -> None:
    cache = StaticCache(32).allocate(2, 2, 64, dtype=torch.float16, device="cuda")
    full = DynamicCache()
    shape = (2, 2, 1, 64)
    key, value, query = (torch.randn(shape, device="cuda", dtype=torch.float16) for _ in range(3))

    def step() -> Tensor:
        return attend(query, cache.update(key, value), backend="reference")

    with torch.no_grad():
        step()
        graph = torch.cuda.CUDAGraph()
        cache.reset()
        with torch.cuda.graph(graph):
            out = step()
        cache.reset()
        for _ in range(20):
            for tensor in (key, value, query):
                tensor.normal_()
            graph.replay()
            expected = attend(query, full.update(key, value), backend="reference")
            torch.testing.assert_close(out, expected)
    assert int(cache._count) == 20


@pytest.mark.gpu
def test_a_recorded_step_does_not_wait_for_the_device() -> None:
    cache = StaticCache(32).allocate(2, 2, 64, dtype=torch.float16, device="cuda")
    key = torch.randn(2, 2, 1, 64, device="cuda", dtype=torch.float16)
    with torch.no_grad():
        cache.update(key, key)
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                cache.next_positions(1, key.device)
                cache.update(key, key)
        finally:
            torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.serial
@pytest.mark.parametrize("num_kv_heads", [8, 2])
def test_a_long_generation_of_a_module_needs_little_more_than_its_cache(num_kv_heads: int) -> None:
    attention = MultiheadAttention(
        {"xpos_rel_pos": True}, 512, 8, self_attention=True, num_kv_heads=num_kv_heads
    ).eval()
    x, earlier = torch.randn(1, 1, 512), torch.randn(1, num_kv_heads, 1, 64)
    nbytes = 0

    def generate() -> None:
        nonlocal nbytes
        cache = StaticCache(4096)
        for number in range(4096):
            # Most of them without the module: profiling takes a millisecond an operation.
            if 8 <= number < 4088:
                cache.update(earlier, earlier)
            else:
                attention(x, x, x, cache, is_causal=True, need_weights=False)
        assert cache.length == 4096
        nbytes = cache.nbytes

    with torch.inference_mode():
        peak = peak_bytes(generate, device="cpu")
    assert nbytes == 2 * num_kv_heads * 4096 * 64 * 4
    assert nbytes <= peak <= 1.1 * nbytes, f"{peak / nbytes:.3f} times its cache"


def test_padding_may_become_a_number_to_add() -> None:
    key, value = tokens(6)
    hidden = torch.tensor([[True, False, False], [False] * 3])
    added = torch.tensor([[0.0, -1.5, 0.0], [-torch.inf, 0.0, 0.0]])
    caches = StaticCache(8), DynamicCache()
    for new, part in ((hidden, slice(0, 3)), (added, slice(3, 6))):
        found, expected = (
            cache.update(key[:, :, part], value[:, :, part], new).padding for cache in caches
        )
        assert found is not None
        assert expected is not None
        assert torch.equal(found, expected)
    assert torch.equal(*(cache.state_dict()["padding"] for cache in caches))
    assert caches[0].state_dict()["padding"][0].tolist() == [-torch.inf, 0, 0, 0, -1.5, 0]


def test_padding_that_was_cropped_does_not_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    key, value = tokens(5)
    cache = StaticCache(8)
    cache.update(key[:, :, :4], value[:, :, :4], torch.ones(2, 4, dtype=torch.bool))
    cache.crop(2)
    monkeypatch.setattr(static_module, "is_recorded", lambda device: True)
    cached = cache.update(key[:, :, 4:], value[:, :, 4:])
    assert cached.padding is not None
    assert cached.padding.tolist() == [[True, True] + [False] * 6] * 2


def test_keys_and_values_that_were_cropped_do_not_come_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    key, value = tokens(4)
    cache = StaticCache(8)
    cache.update(key * torch.nan, value * torch.nan)
    cache.crop(0)
    monkeypatch.setattr(static_module, "is_recorded", lambda device: True)
    cached = cache.update(key[:, :, :1], value[:, :, :1])
    assert cached.key.isfinite().all()
    assert cached.value.isfinite().all()
