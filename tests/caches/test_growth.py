"""Appending: like `torch.cat`, without the copies; and a plain dict on top of it."""

import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.caches.histories import same
from tests.caches.interfaces import tokens
from zeta.caches import DictCache, DynamicCache, QuantizedCache, growth
from zeta.caches.growth import append, nbytes, reclaim, take


def test_a_generation_copies_its_length_not_its_square(monkeypatch: pytest.MonkeyPatch) -> None:
    copied = 0
    copy_ = Tensor.copy_

    def counting(self: Tensor, source: Tensor) -> Tensor:
        nonlocal copied
        copied += source.numel()
        return copy_(self, source)

    monkeypatch.setattr(Tensor, "copy_", counting)
    grown, one = None, torch.ones(1, 1, 1, 1)
    for _ in range(3000):
        grown = append(grown, one)
    # Every token once, and at the doublings 64, 128, ..., 2048 all that were there.
    assert 3000 < copied < 3 * 3000


def test_a_tensor_that_was_given_back_never_changes() -> None:
    kept: list[tuple[Tensor, Tensor]] = []
    grown = None
    generator = torch.Generator().manual_seed(3)
    for step in range(200):
        if kept and step % 7 == 0:
            # Another continues from an earlier tensor, or from a part of one.
            grown = kept[int(torch.randint(len(kept), (), generator=generator))][0]
            grown = grown[:, :, : grown.shape[2] - step % 2] if grown.shape[2] > 1 else grown
        before = None if grown is None else grown.clone()
        new = torch.randn(2, 1, 1 + step % 3, 3, generator=generator)
        grown = append(grown, new)
        assert torch.equal(grown, new if before is None else torch.cat((before, new), dim=2))
        kept.append((grown, grown.clone()))
    assert all(torch.equal(found, copy) for found, copy in kept)
    assert all(found._version == 0 for found, _ in kept)


def test_a_part_that_is_no_prefix_is_copied() -> None:
    whole = append(None, torch.randn(2, 2, 4, 3))
    copy = whole.clone()
    shorter = whole[:, :, :3]
    reclaim(whole, 3)
    for part in (
        whole[:, :, 1:], whole[1:], whole.transpose(1, 0), whole[..., :2], shorter[:1],
        shorter[:, :1],
    ):  # fmt: skip
        new = torch.randn(*part.shape[:2], 1, part.shape[3])
        assert torch.equal(append(part, new), torch.cat((part, new), dim=2))
    assert torch.equal(whole, copy)


def test_a_buffer_is_filled_to_its_end_and_a_new_one_has_room() -> None:
    one = torch.ones(1, 1, 1, 1)
    grown = append(None, one.expand(1, 1, 63, 1))
    full = append(grown, one)
    assert full.data_ptr() == grown.data_ptr()
    assert (nbytes(full), nbytes(append(full, one))) == (64 * 4, 128 * 4)
    whole = append(None, one.expand(1, 1, 64, 1))
    assert append(whole, one).data_ptr() == whole.data_ptr()


def test_reclaimed_room_is_used_again_and_what_showed_it_counts_as_changed() -> None:
    grown = append(None, torch.randn(1, 1, 10, 2))
    shorter = grown[:, :, :6]
    reclaim(grown, 6)
    again = append(shorter, torch.randn(1, 1, 1, 2))
    assert again.data_ptr() == grown.data_ptr()
    assert grown._version == 1


@pytest.mark.parametrize("undo", ["crop", "rollback", "take_back"])
def test_the_room_of_tokens_that_are_gone_is_used_again(undo: str) -> None:
    cache = DynamicCache()
    cache.update(*tokens(3))
    address = cache.key.data_ptr()
    for _ in range(3):
        cache.fork()
        cache.update(*tokens(2))
        cache.crop(3) if undo == "crop" else getattr(cache, undo)()
        assert cache.length == 3
        if undo != "rollback":
            cache.commit()
    cache.update(*tokens(2))
    assert cache.key.data_ptr() == address


def test_a_fork_of_other_memory_keeps_no_room() -> None:
    cache = DynamicCache()
    cache.update(*tokens(5))
    cache.fork()
    cache.reorder(torch.tensor([1, 0]))
    address = cache.key.data_ptr()
    cache.crop(2)
    cache.update(*tokens(1))
    assert cache.key.data_ptr() == address


def test_taking_sequences_leaves_room() -> None:
    grown = append(None, torch.randn(3, 2, 70, 2))
    index = torch.tensor([2, 2, 0, 1])
    taken = take(grown, index)
    assert torch.equal(taken, grown[index])
    longer = append(taken, torch.randn(4, 2, 1, 2))
    assert longer.data_ptr() == taken.data_ptr()
    assert nbytes(taken) == 4 * 2 * 128 * 2 * 4


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_the_dict_stays_readable_and_its_steps_copy_nothing(mode: Callable[[], Any]) -> None:
    state: dict[str, Tensor] = {}
    key, value = tokens(100)
    addresses = set()
    for n in range(100):
        with mode():
            DictCache(state).update(key[:, :, n : n + 1], value[:, :, n : n + 1])
        assert torch.equal(state["prev_key"], key[:, :, : n + 1])
        assert torch.equal(state["prev_value"], value[:, :, : n + 1])
        addresses.add(state["prev_key"].data_ptr())
    assert len(addresses) == 2


def test_two_continuations_of_one_dict_do_not_disturb_each_other() -> None:
    state: dict[str, Tensor] = {}
    DictCache(state).update(*tokens(3))
    first, second = dict(state), dict(state)
    for other in (first, second):
        key, value = tokens(2)
        expected = torch.cat((state["prev_key"], key), dim=2)
        DictCache(other).update(key, value)
        assert torch.equal(other["prev_key"], expected)
    assert torch.equal(first["prev_key"][:, :, :3], second["prev_key"][:, :, :3])
    assert not torch.equal(first["prev_key"], second["prev_key"])


def test_a_dict_of_keys_and_values_alone_is_taken_over_and_not_written_to() -> None:
    mine = torch.randn(2, 2, 8, 6, dtype=torch.float64)
    copy = mine.clone()
    value = tokens(5)[1]
    state = {"prev_key": mine[:, :, :5], "prev_value": value}
    key, new = tokens(1)
    DictCache(state).update(key, new)
    assert torch.equal(state["prev_key"], torch.cat((copy[:, :, :5], key), dim=2))
    assert torch.equal(mine, copy)
    cache = DynamicCache({"prev_key": mine[:, :, :5], "prev_value": value})
    assert torch.equal(cache.update(key, new).key, state["prev_key"])
    assert torch.equal(mine, copy)


def test_a_dynamic_cache_goes_on_from_all_that_a_dict_has() -> None:
    state: dict[str, Tensor] = {}
    assert DynamicCache(state).length == 0
    first = torch.tensor([2])
    assert DictCache(state).origin(first) is first
    padding = torch.tensor([[True, False, False], [False, False, False]])
    DictCache(state, lambda key: key).update(*tokens(3), padding, origin=first)
    assert state["prev_key_origin"].tolist() == [2, 2]
    cache = DynamicCache(state)
    assert cache.origin(None).tolist() == [2, 2]
    found = cache.update(*tokens(1)).padding
    assert torch.equal(found, torch.nn.functional.pad(padding, (0, 1)))


def test_a_dict_that_had_nothing_has_nothing_again() -> None:
    state: dict[str, Tensor] = {}
    cache = DictCache(state)
    cache.update(*tokens(3), torch.zeros(2, 3))
    cache.take_back()
    assert state == {}
    flat = {"prev_key": torch.zeros(2, 2), "prev_value": torch.zeros(2, 2)}
    with pytest.raises(ValueError, match=r"must have shape \(2, 2, length, 6\).*got \(2, 2\)"):
        DictCache(flat).update(*tokens(1))


def test_a_dict_can_be_saved_with_nothing_but_tensors_in_it() -> None:
    state: dict[str, Tensor] = {}
    DictCache(state).update(*tokens(3))
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    key, value = tokens(1)
    DictCache(loaded).update(key, value)
    assert torch.equal(loaded["prev_key"], torch.cat((state["prev_key"], key), dim=2))


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"prev_key": torch.zeros(1, 1, 1, 1)}, "must have 'prev_key' and 'prev_value'"),
        ({"prev_key_static": torch.ones(1)}, "keys of a cross-attention, which do not grow"),
        ({"prev_key": 1, "prev_value": 1, "keys": 1}, r"got \['keys', 'prev_key', 'prev_value'\]"),
    ],
)
def test_a_dict_of_another_kind_is_refused(state: dict[str, Tensor], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DynamicCache(state)


def test_nbytes_counts_the_room() -> None:
    cache = DynamicCache()
    assert cache.nbytes == 0
    cache.update(*tokens(65))
    assert cache.nbytes == 2 * 2 * 128 * (6 + 5) * 8
    cache.update(*tokens(1))
    memory = weakref.ref(cache.key._base)
    cache.reset()
    assert (cache.nbytes, cache.length, cache.key, cache.value) == (0, 0, None, None)
    assert memory() is None


def buffers_of(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of all buffers that are there when one has just been made, each time."""
    alive: list[weakref.ref[Tensor]] = []
    held: list[int] = []
    make = growth._with_room

    def counting(*arguments: Any) -> Any:
        shown, tail = make(*arguments)
        alive.append(weakref.ref(shown))
        held.append(sum(tensor.nbytes for ref in alive if (tensor := ref()) is not None))
        return shown, tail

    monkeypatch.setattr(growth, "_with_room", counting)
    return held


@pytest.mark.parametrize("make", [DynamicCache, QuantizedCache])
def test_a_part_leaves_its_old_memory_before_the_next_one_moves(
    make: Callable[[], DynamicCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = buffers_of(monkeypatch)
    cache = make()
    key = torch.randn(1, 2, 126, 6)
    for count in (126, 1, 2):
        cache.update(key[:, :, :count], key[:, :, :count])
    assert cache.nbytes < max(held) <= 1.25 * cache.nbytes


@pytest.mark.parametrize("forked", [False, True])
@pytest.mark.parametrize(
    ("make", "fails_at"),
    [(DynamicCache, number) for number in (1, 2)]
    + [(QuantizedCache, number) for number in (1, 2, 3, 4)],
)
@pytest.mark.parametrize("length", [64, 127])
def test_a_cache_that_gets_no_memory_for_the_second_half_is_whole(
    length: int,
    fails_at: int,
    forked: bool,
    make: Callable[[], DynamicCache],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache, other = make(), make()
    key, value = tokens(length)
    for one in (cache, other):
        one.update(key, value)
        if forked:
            one.fork()
    was = cache.state_dict()
    make_room, calls = growth._with_room, []

    def failing(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == fails_at:
            raise MemoryError("no room")
        return make_room(*arguments)

    new = tokens(65)
    with monkeypatch.context() as patch:
        patch.setattr(growth, "_with_room", failing)
        with pytest.raises(MemoryError, match="no room"):
            cache.update(*new)
    assert same(cache.state_dict(), was)
    cache.take_back()
    assert same(cache.state_dict(), was)
    for one in (cache, other):
        one.update(*new)
    assert same(cache.state_dict(), other.state_dict())
    cache.take_back()
    assert same(cache.state_dict(), was)
    cache.update(*new)
    if forked:
        cache.rollback()
        assert same(cache.state_dict(), was)
        cache.update(*new)
    assert same(cache.state_dict(), other.state_dict())


def test_room_that_was_made_before_an_error_is_used_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = DynamicCache()
    cache.update(*tokens(127))
    make_room, sizes = growth._with_room, []

    def failing(like: Tensor, length: int) -> Any:
        sizes.append(like.shape[3])
        if len(sizes) == 2:
            raise MemoryError("no room")
        return make_room(like, length)

    monkeypatch.setattr(growth, "_with_room", failing)
    with pytest.raises(MemoryError, match="no room"):
        cache.update(*tokens(2))
    cache.update(*tokens(2))
    # The keys found theirs; only the values asked again.
    assert sizes == [6, 5, 5]


def test_keys_that_were_given_back_outlive_the_move() -> None:
    cache = DynamicCache()
    key, value = tokens(127)
    seen = cache.update(key, value)
    cache.update(*tokens(2))
    assert torch.equal(seen.key, key)
    assert torch.equal(seen.value, value)
    cache.take_back()
    new = tokens(2)
    again = cache.update(*new)
    assert torch.equal(again.key, torch.cat((key, new[0]), dim=2))
    assert torch.equal(seen.value, value)
