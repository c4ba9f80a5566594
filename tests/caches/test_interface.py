"""What every cache does the same way: forks, padding, modes of autograd, devices, state dicts."""

import weakref

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from tests.caches.histories import same
from tests.caches.interfaces import NAMES, cross, filled, tokens
from tests.caches.kinds import KINDS
from zeta.caches import (
    Cache,
    CrossCache,
    DecodingCache,
    DictCache,
    DynamicCache,
    PagedCache,
    PagePool,
    RollingCache,
    StaticCache,
)


@pytest.mark.parametrize("name", NAMES)
def test_padding_for_all_tokens_replaces_what_was_remembered(name: str) -> None:
    cache = filled(name)
    padding = torch.tensor([[False, True, False, True, True], [True, False, False, False, False]])
    cached = cache.update(*tokens(2), padding)
    assert cached.key.shape[2] == cache.length == 5
    assert torch.equal(cached.padding, padding)


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("name", NAMES)
def test_what_was_taken_back_was_never_there(name: str, count: int) -> None:
    cache = filled(name)
    cache.update(*tokens(6))
    before = cache.state_dict()
    # Padding of the new tokens, and of all.
    for length in (count, 9 + count):
        padding = torch.ones(2, length, dtype=torch.bool)
        cache.update(*tokens(count), padding, origin=torch.tensor([3]))
        cache.take_back()
        assert same(before, cache.state_dict())


@pytest.mark.parametrize("undo", ["take_back", "crop"])
@pytest.mark.parametrize("name", ["dynamic", "static", "rolling", "rolling with sinks"])
def test_what_is_gone_and_written_over_counts_as_changed(name: str, undo: str) -> None:
    cache = filled(name)
    seen = cache.update(*tokens(1))
    versions = seen.key._version, seen.value._version
    cache.crop(cache.length)
    assert (seen.key._version, seen.value._version) == versions
    cache.crop(3) if undo == "crop" else cache.take_back()
    cache.update(*tokens(1))
    assert seen.key._version > versions[0]
    assert seen.value._version > versions[1]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
@pytest.mark.parametrize("name", [*NAMES, "cross"])
def test_sequences_are_named_by_any_integers(name: str, dtype: torch.dtype) -> None:
    found, expected = (cross() if name == "cross" else filled(name) for _ in range(2))
    expected.load_state_dict(found.state_dict())
    for operation, rows in (("reorder", [1, 0]), ("select", [0, 1, 1])):
        new = tokens(1, batch=len(rows))
        for cache, index in ((found, torch.tensor(rows, dtype=dtype)), (expected, rows)):
            getattr(cache, operation)(torch.as_tensor(index))
            cache.update(*new)
        states = [cache.state_dict() for cache in (found, expected)]
        assert same(*(state.get("tensors", state) for state in states))


@pytest.mark.parametrize("name", NAMES)
def test_a_fork_keeps_what_is_cropped_and_written_over(name: str) -> None:
    cache = filled(name)
    cache.update(*tokens(1), origin=torch.tensor([3]))
    before = cache.state_dict()
    cache.fork()
    cache.crop(1)
    cache.update(*tokens(2), origin=torch.tensor([8]))
    cache.rollback()
    assert same(before, cache.state_dict())


def test_unequal_states_are_not_the_same() -> None:
    cache = filled("dynamic")
    before = cache.state_dict()
    assert not same(before, before | {"key": before["key"] + 1})
    assert not same(before, before | {"padding": None})
    assert not same(before, {**before, "more": 1})


@pytest.mark.parametrize("name", NAMES)
def test_a_state_dict_is_a_copy_and_survives_saving(name: str, tmp_path) -> None:
    cache = filled(name)
    state = cache.state_dict()
    torch.save(state, tmp_path / "cache.pt")
    cache.crop(1)
    cache.update(*tokens(4))
    cache.fork()
    cache.load_state_dict(torch.load(tmp_path / "cache.pt"))
    assert same(state, cache.state_dict())
    assert cache.length == 3
    with pytest.raises(ValueError, match="needs an open fork"):
        cache.rollback()


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_counted_with_those_of_the_padding(name: str) -> None:
    plain = KINDS[name].make(2)
    plain.update(*tokens(3))
    assert 2 * 3 <= filled(name).nbytes - plain.nbytes <= 2 * 24


@pytest.mark.parametrize("name", NAMES)
def test_a_loaded_state_is_a_copy_too(name: str) -> None:
    cache = KINDS[name].make(2)
    padding = torch.tensor([[True, False, False], [False, True, False]])
    cache.update(*tokens(3), padding, origin=torch.tensor([2, 3]))
    state, kept = cache.state_dict(), cache.state_dict()
    cache.load_state_dict(state)
    for tensor in state.values():
        if isinstance(tensor, Tensor):
            tensor.zero_()
    assert same(cache.state_dict(), kept)


@pytest.mark.parametrize("name", NAMES)
def test_modes_of_autograd_may_change_between_steps(name: str) -> None:
    with torch.inference_mode():
        cache = KINDS[name].make(2)
    modes = [torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode]
    for mode in [*modes, torch.no_grad]:
        with mode():
            cache.fork()
            cache.update(*tokens(2), torch.tensor([[True, False], [False, False]]))
            cache.rollback()
            cache.update(*tokens(2), torch.tensor([[True, False], [False, False]]))
            cache.reorder(torch.tensor([1, 1]))
            cache.crop(cache.length - 1) if cache.length < 4 else None
    assert cache.length >= 6


@pytest.mark.parametrize("name", NAMES)
def test_forks_nest(name: str) -> None:
    cache = filled(name)
    before = cache.state_dict()
    cache.fork()
    cache.update(*tokens(1))
    middle = cache.state_dict()
    cache.fork()
    cache.reorder(torch.tensor([1, 0]))
    cache.update(*tokens(5))
    cache.rollback()
    assert same(middle, cache.state_dict())
    cache.fork()
    cache.update(*tokens(1))
    cache.commit()
    assert cache.length == 5
    cache.rollback()
    assert same(before, cache.state_dict())


# torch's forward mode uses it itself.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("name", [n for n in NAMES if n != "dynamic"])
def test_a_gradient_is_not_lost_in_silence(name: str) -> None:
    cache = KINDS[name].make(2)
    key, value = tokens(2)
    with pytest.raises(ValueError, match="keeps no gradient"):
        cache.update(key.requires_grad_(), value)
    assert cache.length == 0
    with torch.no_grad():
        assert not cache.update(key, value).key.requires_grad
    cache.reset()
    with forward_ad.dual_level(), pytest.raises(ValueError, match="keeps no forward-mode"):
        cache.update(forward_ad.make_dual(key, key), value)


@pytest.mark.parametrize("name", [*NAMES, "cross"])
def test_an_empty_cache_has_nothing_to_change(name: str) -> None:
    cache = CrossCache() if name == "cross" else KINDS[name].make(2)
    cache.take_back()
    cache.reorder(torch.tensor([1, 0]))
    cache.select(torch.tensor([2]))
    cache.crop(0)
    assert (cache.length, cache.nbytes) == (0, 0)


@pytest.mark.parametrize("begin", [[4], [4, 7]])
@pytest.mark.parametrize("name", NAMES)
def test_tokens_count_from_where_the_first_of_them_did(name: str, begin: list[int]) -> None:
    cache, first, other = KINDS[name].make(2), torch.tensor(begin), torch.tensor([9])
    assert cache.origin(first) is first
    cache.update(*tokens(2), origin=first)
    cache.reorder(torch.tensor([1, 0]))
    cache.crop(1)
    assert cache.origin(other).tolist() == [begin[-1], 4]
    # Nothing is left of those that counted from there.
    cache.crop(0)
    assert cache.origin(other) is other
    cache.update(*tokens(2))
    assert cache.origin(other) is None


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("name", KINDS)
def test_padding_is_remembered_as_it_was_given(name: str, dtype: torch.dtype) -> None:
    ours, theirs = KINDS[name].make(2), KINDS[name].make(2)
    key, value = tokens(4)
    padding = torch.tensor([[True, False, False, True], [False, True, False, False]]).to(dtype)
    # Of the new tokens, and of all.
    for new, given in ((slice(0, 3), padding[:, :3]), (slice(3, 4), padding)):
        buffer = given.clone()
        for cache, mask in ((ours, buffer), (theirs, given)):
            cache.update(key[:, :, new], value[:, :, new], mask)
        # As a server does that fills the same one for each call.
        buffer.zero_()
        assert same(ours.state_dict(), theirs.state_dict())


def test_padding_of_a_source_is_remembered_as_it_was_given() -> None:
    cache, buffer = CrossCache(), torch.tensor([[True, False, False]] * 2)
    cache.update(*tokens(3), buffer)
    buffer.zero_()
    assert cache.reuse(2).padding.tolist() == [[True, False, False]] * 2


def test_a_dynamic_cache_keeps_the_gradient() -> None:
    cache = DynamicCache()
    key, value = tokens(4)
    key.requires_grad_()
    parts = zip(key.split([2, 1, 1], dim=2), value.split([2, 1, 1], dim=2), strict=True)
    found = [cache.update(*part).key for part in parts]
    sum(f.sum() for f in found).backward()
    assert torch.equal(key.grad[0, 0, :, 0], torch.tensor([3.0, 3, 2, 1], dtype=torch.float64))


@pytest.mark.parametrize("earlier", [False, True])
def test_a_gradient_is_there_again_after_a_step_without_it_failed(earlier: bool) -> None:
    cache = DynamicCache()
    for requires_grad in (earlier, not earlier):
        key, value = tokens(3)
        with torch.set_grad_enabled(requires_grad):
            cache.update(key.requires_grad_(requires_grad), value)
    cache.take_back()
    assert cache.key.requires_grad == earlier


def test_kinds_of_protocol() -> None:
    assert isinstance(DictCache({}), Cache)
    assert not isinstance(DictCache({}), DecodingCache)
    assert not isinstance(CrossCache(), Cache)
    for name in NAMES:
        assert isinstance(KINDS[name].make(2), DecodingCache)


@pytest.mark.parametrize("name", NAMES)
def test_moving_to_where_it_is_changes_nothing(name: str) -> None:
    cache = filled(name)
    cache.fork()
    before = cache.state_dict()
    assert cache.to("cpu") is cache
    cache.update(*tokens(1))
    cache.rollback()
    assert same(before, cache.state_dict())


@pytest.mark.gpu
@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith("paged")])
def test_moving_to_another_device(name: str) -> None:
    cache = filled(name)
    cache.fork()
    before = cache.state_dict()
    assert cache.to("cuda") is cache
    key, value = tokens(1)
    assert cache.update(key.cuda(), value.cuda()).key.device.type == "cuda"
    cache.rollback()
    cache.to("cpu")
    assert same(before, cache.state_dict())


@pytest.mark.parametrize("change", ["select", "reorder", "rollback", "load_state_dict"])
@pytest.mark.parametrize("name", ["dynamic", "rolling"])
def test_what_was_replaced_is_not_held(name: str, change: str) -> None:
    cache = filled(name)
    cache.fork()
    cache.update(*tokens(70))
    held = weakref.ref(cache._state.slots.key if name == "rolling" else cache._state.parts[0])
    if change == "rollback":
        cache.rollback()
    elif change == "load_state_dict":
        cache.load_state_dict(filled(name).state_dict())
    else:
        cache.commit()
        getattr(cache, change)(torch.tensor([1]) if change == "select" else torch.tensor([1, 0]))
    if name != "rolling" or change not in ("reorder", "rollback"):
        assert held() is None
    # There is nothing to take back.
    before = cache.state_dict()
    cache.take_back()
    assert same(before, cache.state_dict())


def test_numbers_of_numpy_may_be_sizes_and_lengths() -> None:
    byte = np.uint8
    pool = PagePool(
        byte(60),
        byte(16),
        num_kv_heads=byte(2),
        head_dim=byte(6),
        value_dim=byte(5),
        dtype=torch.float64,
    )
    makes = {
        "rolling": lambda number: RollingCache(number(4), number(1)),
        "static": lambda number: StaticCache(number(250)),
        "paged": lambda number: PagedCache(pool),
        "dynamic": lambda number: DynamicCache(),
    }
    for make in makes.values():
        caches = make(byte), make(int)
        prompt, new = tokens(200), tokens(40)
        for cache, number in zip(caches, (byte, int), strict=True):
            cache.update(*prompt)
            cache.crop(number(cache.length))
            cache.update(*new)
            if isinstance(cache, PagedCache):
                cache.drop(number(3))
        assert caches[0].length == caches[1].length
        assert type(caches[0].length) is int
        if not isinstance(caches[0], RollingCache):
            caches[0].crop(byte(9))
            caches[1].crop(9)
            caches[0].update(*new)
            caches[1].update(*new)
        assert same(*(cache.state_dict() for cache in caches))
