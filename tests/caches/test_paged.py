"""`PagedCache` and `PagePool`: shared pages, and every one of them given back."""

import gc
import random
import threading
from collections.abc import Iterator

import pytest
import torch

from tests.caches.histories import same
from tests.caches.interfaces import tokens
from tests.caches.kinds import new_pool
from zeta.caches import CacheFullError, PagedCache, PagePool


def test_beams_share_their_prompt_until_they_differ() -> None:
    pool = new_pool(100, 4)
    cache = PagedCache(pool)
    cache.update(*tokens(10, batch=1))
    assert pool.num_free == 97
    cache.select(torch.tensor([0] * 5))
    assert pool.num_free == 97
    cache.update(*tokens(1, batch=5))
    # Four of the five copied the last page, which is half full; the prompt's others are shared.
    assert pool.num_free == 93
    cache.select(torch.tensor([3]))
    assert pool.num_free == 97
    cache.reset()
    assert pool.num_free == 100


def test_the_last_to_leave_a_shared_page_keeps_it() -> None:
    pool = new_pool(2, 4)
    cache = PagedCache(pool)
    cache.update(*tokens(3, batch=1))
    cache.select(torch.tensor([0, 0]))
    # Whoever stores nothing leaves nothing.
    cache.update(*tokens(2), torch.ones(2, 2, dtype=torch.bool))
    assert pool.num_free == 1
    cache.update(*tokens(1))
    assert (cache.lengths, pool.num_free) == ((4, 4), 0)


def test_a_duplicate_shares_pages_and_goes_its_own_way() -> None:
    pool = new_pool(20, 2)
    first = PagedCache(pool)
    first.update(*tokens(5))
    before = first.state_dict()
    second = first.duplicate()
    assert pool.num_free == 14
    second.update(*tokens(3))
    assert same(before, first.state_dict())
    first.reset()
    assert second.length == 8
    del second
    assert pool.num_free == 20


@pytest.mark.parametrize(("close", "used"), [("commit", 6), ("rollback", 4), ("reset", 0)])
def test_a_closed_fork_has_no_pages(close: str, used: int) -> None:
    pool = new_pool(20, 2)
    cache = PagedCache(pool)
    cache.update(*tokens(3))
    cache.fork()
    cache.update(*tokens(3))
    assert pool.num_free == 20 - 4 - 4
    getattr(cache, close)()
    assert pool.num_free == 20 - used
    cache.reset()
    assert pool.num_free == 20


def test_sequences_of_different_lengths_are_each_what_they_would_be_alone() -> None:
    pool = new_pool(50, 3)
    cache = PagedCache(pool)
    key, value = tokens(5, batch=3)
    lengths = torch.tensor([5, 2, 0])
    cached = cache.update(key, value, torch.arange(5) >= lengths[:, None])
    assert cache.lengths == (5, 2, 0)
    assert cached.padding is None
    assert cached.positions is not None
    assert cached.positions.tolist() == [[0, 1, 2, 3, 4], [0, 1, -1, -1, -1], [-1] * 5]
    assert cache.next_positions(2, key.device).tolist() == [[5, 6], [2, 3], [0, 1]]
    cache.crop(3)
    assert cache.lengths == (3, 2, 0)
    cache.update(*tokens(1, batch=3))
    assert cache.lengths == (4, 3, 1)
    cache.select(torch.tensor([1, 1]))
    assert cache.next_positions(2, key.device).tolist() == [[3, 4]]


@pytest.mark.parametrize("begun", [False, True])
def test_sequences_may_all_be_without_a_token(begun: bool) -> None:
    pool, every = new_pool(4, 4), torch.ones(2, 2, dtype=torch.bool)
    cache = PagedCache(pool)
    if begun:
        cache.update(*tokens(2), every.tril(-1))
        cache.crop(0)
    cached = cache.update(*tokens(2), every)
    # One empty slot stands for their keys.
    assert torch.equal(cached.key, torch.zeros_like(tokens(1)[0]))
    assert cached.positions is not None
    assert cached.positions.tolist() == [[-1], [-1]]
    assert cached.padding is None
    other = PagedCache(pool)
    other.load_state_dict(cache.state_dict())
    assert (other.lengths, pool.num_free) == ((0, 0), 4)


def test_the_last_tokens_of_each_sequence_are_dropped() -> None:
    pool = new_pool(50, 3)
    cache = PagedCache(pool)
    key, value = tokens(5, batch=3)
    padding = torch.arange(5) >= torch.tensor([5, 2, 3])[:, None]
    padding[0, 1] = True
    cache.update(key, value, padding)
    before, free = cache.state_dict(), pool.num_free
    cache.drop(0)
    cache.update(*tokens(4, batch=3))
    cache.drop(3)
    cache.drop(1)
    assert same(cache.state_dict(), before)
    assert pool.num_free == free
    for count, words in ((3, r"count must be in \[0, 2\].*got 3"), (-1, "got -1")):
        with pytest.raises(ValueError, match=words):
            cache.drop(count)
    assert same(cache.state_dict(), before)
    PagedCache(pool).drop(0)


def test_nothing_of_others_shows_behind_the_end_of_a_sequence() -> None:
    pool = new_pool(4, 4)
    key, value = tokens(4)
    dirty = PagedCache(pool)
    dirty.update(key * torch.nan, value * torch.nan)
    dirty.reset()
    cache = PagedCache(pool)
    cached = cache.update(key, value, torch.tensor([[False] * 4, [False, True, True, True]]))
    assert cached.key.isfinite().all()
    assert cached.value.isfinite().all()


def test_random_traffic_gives_every_page_back_and_never_mixes_sequences() -> None:
    generator = random.Random(5)
    pool = new_pool(60, 3)
    live: list[tuple[PagedCache, list[torch.Tensor]]] = []
    full = shared = 0
    for _ in range(3000):
        action = generator.choice(["new", "step", "step", "step", "copy", "drop", "fork", "order"])
        if action == "new" or not live:
            live.append((PagedCache(pool), []))
        cache, rows = generator.choice(live)
        try:
            if action in ("new", "step"):
                batch = len(rows) or generator.randint(1, 3)
                key, value = tokens(generator.randint(1, 5), batch=batch)
                cache.update(key, value)
                old = rows or [key[0, :, :0]] * batch
                rows[:] = [torch.cat((row, new), dim=1) for row, new in zip(old, key, strict=True)]
            elif action == "copy":
                live.append((cache.duplicate(), list(rows)))
            elif action == "drop":
                live.remove(next(pair for pair in live if pair[0] is cache))
                cache.reset()
            elif action == "fork" and rows:
                cache.fork()
                cache.update(*tokens(2, batch=len(rows)))
                cache.rollback()
            elif action == "order" and rows:
                index = [generator.randrange(len(rows)) for _ in range(generator.randint(1, 3))]
                cache.select(torch.tensor(index))
                rows[:] = [rows[b] for b in index]
        except CacheFullError:
            full += 1
            if len(cache._forks):
                cache.rollback()
            gone, _ = live.pop(generator.randrange(len(live)))
            gone.reset()
        for other, expected in live:
            assert other.lengths == tuple(row.shape[1] for row in expected)
        if live:
            other, expected = generator.choice(live)
            if expected:
                assert torch.equal(other.state_dict()["key"], torch.stack(expected))
        tables = [
            table for other, _ in live for table in (other._rows.tables if other._rows else ())
        ]
        used = [page for table in tables for page in table]
        assert pool.num_free == 60 - len(set(used))
        shared += len(used) > len(set(used))
    assert full > 10
    assert shared > 100
    for cache, _ in live:
        cache.reset()
    assert pool.num_free == 60


def test_threads_share_a_pool() -> None:
    pool = new_pool(400, 2)
    wrong: list[int] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(20):
            cache, expected = PagedCache(pool), None
            for _ in range(10):
                key = torch.randn(2, 2, 3, 6, dtype=torch.float64, generator=generator)
                cached = cache.update(key, key[..., :5])
                expected = key if expected is None else torch.cat((expected, key), dim=2)
                if not torch.equal(cached.key, expected):
                    wrong.append(seed)
            cache.reset()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert pool.num_free == 400


def test_a_cache_may_become_garbage_while_pages_are_counted() -> None:
    pool = new_pool(8, 4)
    garbage: list[object] = []
    cache = PagedCache(pool)
    cache.update(*tokens(3))
    garbage += cache, garbage
    mine = pool.take(2)

    def pages() -> Iterator[int]:
        """Collects between two pages, as Python may at any time."""
        for page in mine:
            yield page
            gc.collect()

    del cache, garbage
    thread = threading.Thread(target=lambda: pool.give_back(pages()), daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert not thread.is_alive()
    assert pool.num_free == 8


def test_bytes_are_those_of_the_pages_in_use() -> None:
    pool = new_pool(10, 4)
    cache = PagedCache(pool)
    assert cache.nbytes == 0
    cache.update(*tokens(5))
    assert cache.nbytes == 4 * pool.page_nbytes == 4 * 2 * 4 * (6 + 5) * 8
    cache.select(torch.tensor([0, 0, 0]))
    assert cache.nbytes == 2 * pool.page_nbytes


def test_a_pool_of_other_heads_or_no_pages_is_refused() -> None:
    cache = PagedCache(new_pool(4, 4))
    with pytest.raises(
        ValueError, match=r"key must be \(2, 2, length, 6\).*got \(2, 3, length, 6\)"
    ):
        cache.update(*tokens(1, heads=3))
    assert cache.length == 0
    with pytest.raises(ValueError, match="num_pages must be positive; got 0"):
        PagePool(0, 1, num_kv_heads=1, head_dim=1)
    with pytest.raises(ValueError, match="device must be that of the pool, cpu; got meta"):
        cache.to("meta")


def test_a_state_that_does_not_fit_takes_no_pages() -> None:
    other, pool = PagedCache(new_pool(4, 4, key_heads=3)), new_pool(4, 4)
    other.update(*tokens(3, heads=3))
    cache = PagedCache(pool)
    cache.update(*tokens(3))
    before = cache.state_dict()
    for state, words in (
        (other.state_dict(), r"key must be \(2, 2, length, 6\).*got \(2, 3, length, 6\)"),
        (before | {"lengths": [2, 1]}, "keys as long as its longest sequence, 2; got 3"),
        (before | {"lengths": 3}, r"state\['lengths'\] must be a list; got 3"),
        (before | {"lengths": [3, -1]}, r"state\['lengths'\] must have numbers .*; got -1"),
        (before | {"lengths": [3, True]}, r"state\['lengths'\] must have numbers .*; got True"),
    ):
        with pytest.raises(ValueError, match=words):
            cache.load_state_dict(state)
        assert pool.num_free == 2
        assert same(before, cache.state_dict())


def test_a_mask_for_all_tokens_needs_sequences_of_one_length() -> None:
    cache = PagedCache(new_pool(10, 4))
    cache.update(*tokens(2), torch.tensor([[False, True], [False, False]]))
    before = cache.state_dict()
    with pytest.raises(ValueError, match="of the new tokens, where sequences differ in length"):
        cache.update(*tokens(1), torch.zeros(2, 3, dtype=torch.bool))
    assert same(before, cache.state_dict())


@pytest.mark.gpu
def test_pages_on_another_device() -> None:
    pool = PagePool(8, 4, num_kv_heads=2, head_dim=6, value_dim=5, device="cuda")
    cache = PagedCache(pool)
    key, value = (x.float().cuda() for x in tokens(5))
    assert torch.equal(cache.update(key, value).key, key)
    with pytest.raises(ValueError, match="device must be that of the pool, cuda:0; got cpu"):
        cache.to("cpu")
