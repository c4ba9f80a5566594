"""`RollingCache`: constant memory, and what a crop can bring back."""

import itertools
import weakref

import pytest
import torch

import zeta
from tests.caches.histories import same
from tests.caches.interfaces import tokens
from zeta.caches import RollingCache

PADDINGS = (torch.bool, torch.float32, torch.float64)


@pytest.mark.parametrize("sinks", [0, 3])
def test_memory_is_that_of_the_window(sinks: int) -> None:
    cache = RollingCache(8, sinks)
    for count in (1, 1, 30, 5, *[1] * 50):
        cached = cache.update(*tokens(count))
        assert cache.nbytes == 2 * 2 * (8 + sinks) * (6 + 5) * 8
        assert cached.key.shape[2] <= 8 + sinks + (count if count > 1 else 0)
    assert cache.length == 87


def test_a_single_token_gets_the_window_and_the_sinks_at_their_positions() -> None:
    cache = RollingCache(4, 2)
    key, value = tokens(21)
    for n in range(21):
        cached = cache.update(key[:, :, n : n + 1], value[:, :, n : n + 1])
        positions = torch.arange(n + 1)[None] if cached.positions is None else cached.positions
        expected = sorted({0, 1} & set(range(n + 1)) | set(range(max(0, n - 3), n + 1)))
        assert sorted(positions[0].tolist()) == expected or n < 6
        assert torch.equal(cached.key, key[:, :, positions[0]])
        assert torch.equal(cached.value, value[:, :, positions[0]])
        assert cached.mask is None


def test_a_sink_is_not_seen_before_it_comes() -> None:
    key, value = tokens(3)
    cached = RollingCache(1, 2).update(key, value)
    out = zeta.attention(key, cached.key, cached.value, mask=cached.mask)
    torch.testing.assert_close(out[:, :, 0], value[:, :, 0])


@pytest.mark.parametrize("sinks", [0, 2])
def test_keys_are_in_order_until_one_is_forgotten(sinks: int) -> None:
    cache = RollingCache(4, sinks)
    key, value = tokens(4 + sinks)
    cache.update(key, value)
    cached = cache.update(*tokens(2))
    assert (cached.positions, cached.query_positions) == (None, None)
    assert torch.equal(cached.key[:, :, : 4 + sinks], key)
    assert cache.update(*tokens(2)).positions is not None


@pytest.mark.parametrize("sinks", [0, 2])
def test_what_was_shown_counts_as_changed_once_it_is_written_over(sinks: int) -> None:
    cache = RollingCache(4, sinks)
    seen = cache.update(*tokens(1))
    version = seen.key._version
    for _ in range(3 + sinks):
        cache.update(*tokens(1))
    assert (seen.key._version, seen.value._version) == (version, version)
    cache.update(*tokens(1))
    assert seen.key._version > version
    assert seen.value._version > version


@pytest.mark.parametrize(("grown", "left"), [(17, 15), (18, 15), (18, 14)])
def test_a_crop_within_a_fork_brings_back_what_the_fork_has(grown: int, left: int) -> None:
    plain, forked = RollingCache(4, 1), RollingCache(4, 1)
    key, value = tokens(20)
    for cache in (plain, forked):
        cache.update(key[:, :, :14], value[:, :, :14])
    forked.fork()
    forked.update(key[:, :, 14:grown], value[:, :, 14:grown])
    forked.crop(left)
    forked.commit()
    if left > 14:
        plain.update(key[:, :, 14:left], value[:, :, 14:left])
    assert same(plain.state_dict(), forked.state_dict())


def test_a_fork_has_nothing_of_sequences_in_another_order() -> None:
    cache = RollingCache(4)
    cache.update(*tokens(14))
    cache.fork()
    cache.reorder(torch.tensor([1, 0]))
    cache.update(*tokens(3))
    with pytest.raises(ValueError, match="tokens 11 to 12 are not there any more"):
        cache.crop(15)


@pytest.mark.parametrize("change", ["reorder", "crop"])
def test_a_fork_has_all_of_it_again_after_a_rollback_inside(change: str) -> None:
    cache = RollingCache(4)
    key, value = tokens(12)
    cache.update(key[:, :, :3], value[:, :, :3])
    before = cache.state_dict()
    cache.fork()
    cache.update(key[:, :, 3:], value[:, :, 3:])
    cache.fork()
    if change == "crop":
        cache.crop(1)
    else:
        cache.reorder(torch.tensor([1, 0]))
    cache.rollback()
    cache.crop(3)
    assert same(cache.state_dict(), before)


@pytest.mark.parametrize("padded", [False, True])
def test_padding_that_a_crop_brings_back_is_that_of_the_fork(padded: bool) -> None:
    plain, forked = RollingCache(4), RollingCache(4)
    key, value = tokens(17)
    padding = torch.zeros(2, 17, dtype=torch.bool)
    padding[0, 11:] = padding[1, ::2] = True
    for cache in (plain, forked):
        cache.update(key[:, :, :14], value[:, :, :14], padding[:, :14] if padded else None)
    forked.fork()
    forked.update(key[:, :, 14:], value[:, :, 14:], padding[:, 14:])
    before = forked.state_dict()
    forked.fork()
    forked.crop(15)
    plain.update(key[:, :, 14:15], value[:, :, 14:15], padding[:, 14:15])
    assert same(plain.state_dict(), forked.state_dict())
    forked.rollback()
    assert same(forked.state_dict(), before)


@pytest.mark.parametrize("dtypes", list(itertools.permutations(PADDINGS, 2)))
def test_padding_that_a_crop_brings_back_may_be_of_another_dtype(
    dtypes: tuple[torch.dtype, torch.dtype],
) -> None:
    plain, forked = RollingCache(4), RollingCache(4)
    key, value = tokens(17)
    masks = torch.rand(2, 17).round().split((14, 3), dim=1)
    before, after = (mask.to(dtype) for mask, dtype in zip(masks, dtypes, strict=True))
    for cache in (plain, forked):
        cache.update(key[:, :, :14], value[:, :, :14], before)
    forked.fork()
    forked.update(key[:, :, 14:], value[:, :, 14:], after)
    forked.crop(15)
    plain.update(key[:, :, 14:15], value[:, :, 14:15], after[:, :1])
    assert same(plain.state_dict(), forked.state_dict())


def test_nothing_is_held_after_a_reset() -> None:
    cache = RollingCache(4)
    for _ in range(2):
        cache.update(*tokens(1))
    memory = weakref.ref(cache._state.slots.key)
    cache.reset()
    assert memory() is None


def test_a_fork_has_nothing_of_what_came_after_a_crop() -> None:
    cache = RollingCache(4)
    cache.update(*tokens(3))
    cache.fork()
    cache.crop(1)
    cache.update(*tokens(5))
    with pytest.raises(ValueError, match="tokens 0 to 1 are not there any more"):
        cache.crop(3)


def test_a_crop_of_forgotten_tokens_is_refused() -> None:
    cache = RollingCache(4)
    cache.update(*tokens(10))
    before = cache.state_dict()
    with pytest.raises(
        ValueError, match=r"but tokens 5 to 5 are not there any more; call fork\(\)"
    ):
        cache.crop(9)
    assert same(before, cache.state_dict())
    cache.crop(10)


def test_a_state_of_another_window_is_refused() -> None:
    cache = RollingCache(4)
    cache.update(*tokens(10))
    with pytest.raises(ValueError, match="must have window=5 and sinks=0; got 4 and 0"):
        RollingCache(5).load_state_dict(cache.state_dict())
    with pytest.raises(ValueError, match="state of length 3 must not hold 4 tokens"):
        cache.load_state_dict(cache.state_dict() | {"length": 3})
    with pytest.raises(ValueError, match=r"state\['length'\] must have numbers .*; got 'ten'"):
        cache.load_state_dict(cache.state_dict() | {"length": "ten"})
