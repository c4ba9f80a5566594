"""`StaticCache` beside a CUDA graph that was captured over it, whose replays no Python sees."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.caches.interfaces import tokens
from zeta.caches import DynamicCache, StaticCache
from zeta.caches import static as static_module


def captured(cache: StaticCache, monkeypatch: pytest.MonkeyPatch, *new: Tensor | None) -> Any:
    """What a CUDA graph of a step does when it is replayed: the same to the same tensors."""
    with monkeypatch.context() as patch:
        patch.setattr(static_module, "is_recorded", lambda device: True)
        cache.update(*new)
    (_, keys, values, *_), count, padding = cache._slots, cache._count, cache._padding_BC
    cache.crop(0)

    def replay(key: Tensor, value: Tensor, hidden: Tensor | None = None) -> None:
        keys.index_copy_(2, count[None], key)
        values.index_copy_(2, count[None], value)
        if padding is not None and hidden is not None:
            padding.index_copy_(1, count[None], hidden)
        count.add_(1)

    return replay


@pytest.mark.parametrize("change", ["state", "crop", "fork", "update", "take_back", "reorder"])
def test_what_a_replayed_graph_adds_is_counted(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, other = StaticCache(16), DynamicCache()
    hidden = torch.tensor([[True, False, False], [False, False, True]])
    cache.update(*tokens(3), hidden)
    replay = captured(cache, monkeypatch, *tokens(1), torch.zeros(2, 1, dtype=torch.bool))
    cache.reset()
    prompt = *tokens(3), hidden
    for held in (cache, other):
        held.update(*prompt)
    for number in range(4):
        new = *tokens(1), torch.tensor([[False], [number == 1]])
        replay(*new)
        other.update(*new)
    last = tokens(1)
    for held in (cache, other):
        if change == "crop":
            held.crop(3)
        elif change == "fork":
            held.fork()
            held.update(*last)
            held.rollback()
        elif change == "update":
            held.update(*last)
        elif change == "take_back":
            held.update(*last)
            held.take_back()
        elif change == "reorder":
            held.reorder(torch.tensor([1, 0]))
    new = *tokens(1), torch.tensor([[True], [False]])
    replay(*new)
    other.update(*new)
    assert cache.length == other.length
    ours, theirs = cache.state_dict(), other.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ("key", "value", "padding"))


def test_a_captured_step_is_not_given_what_it_would_not_see(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    padding = torch.zeros(2, 1, dtype=torch.bool)
    with monkeypatch.context() as patch:
        patch.setattr(static_module, "is_recorded", lambda device: True)
        with pytest.raises(ValueError, match=r"call allocate\(\) first"):
            StaticCache(8).update(*tokens(1))
    cache = StaticCache(8)
    cache.update(*tokens(1))
    captured(cache, monkeypatch, *tokens(1))
    for held in (padding, padding.float()):
        with pytest.raises(ValueError, match="without a key_padding_mask in"):
            cache.update(*tokens(1), held)
    with pytest.raises(ValueError, match="without positions for xPos would not see it"):
        cache.update(*tokens(1), origin=torch.tensor([5]))
    assert cache.length == 0
    cache.select(torch.tensor([0]))
    cache.update(*tokens(1, batch=1), padding[:1])
    assert cache.length == 1
