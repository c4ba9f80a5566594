"""`CrossCache` under what a decoder does: the source stays with its sequence."""

import pytest
import torch
from torch import Tensor

from tests.caches.histories import same
from tests.caches.interfaces import tokens
from zeta.caches import CrossCache
from zeta.nn import MultiheadAttention


def attend(attention: MultiheadAttention, query: Tensor, cache: CrossCache) -> Tensor:
    with torch.no_grad():
        return attention(query, None, None, cache, need_weights=False)[0]


def begun() -> tuple[MultiheadAttention, CrossCache, Tensor, Tensor]:
    attention = MultiheadAttention(None, 8, 2, encoder_decoder_attention=True).double().eval()
    memory = torch.randn(3, 5, 8, dtype=torch.float64)
    padding = torch.tensor([[False] * 5, [False] * 4 + [True], [True] + [False] * 4])
    cache = CrossCache()
    with torch.no_grad():
        attention(memory[:, :1], memory, memory, cache, padding)
    return attention, cache, memory, padding


def test_sequences_keep_their_source_through_beams_and_forks() -> None:
    attention, cache, memory, padding = begun()
    query = torch.randn(4, 2, 8, dtype=torch.float64)
    before = attend(attention, query[:3], cache)
    cache.fork()
    cache.reorder(torch.tensor([2, 2, 0]))
    cache.select(torch.tensor([0, 0, 1, 2]))
    rows = torch.tensor([2, 2, 2, 0])
    expected, _ = attention(query, memory[rows], memory[rows], key_padding_mask=padding[rows])
    torch.testing.assert_close(attend(attention, query, cache), expected)
    cache.crop(0)
    assert cache.length == 5
    cache.rollback()
    torch.testing.assert_close(attend(attention, query[:3], cache), before)


def test_queries_are_counted_less() -> None:
    _, cache, _, _ = begun()
    cache.drop(1)
    cache.count_queries(torch.zeros(3, 5, 8))
    cache.drop(2)
    assert cache.state_dict()["tensors"]["prev_queries"].tolist() == [3, 3, 3]
    cache.drop(4)
    assert cache.state_dict()["tensors"]["prev_queries"].tolist() == [0, 0, 0]


def test_it_is_saved_and_loaded_and_reset() -> None:
    attention, cache, _, _ = begun()
    query = torch.randn(3, 2, 8, dtype=torch.float64)
    before, state = attend(attention, query, cache), cache.state_dict()
    cache.fork()
    cache.to("cpu").reset()
    assert (cache.length, cache.nbytes) == (0, 0)
    with pytest.raises(ValueError, match="needs an open fork"):
        cache.rollback()
    cache.fork()
    cache.load_state_dict(state)
    with pytest.raises(ValueError, match="needs an open fork"):
        cache.rollback()
    for tensor in (*state["tensors"].values(), *cache.state_dict()["tensors"].values()):
        tensor.zero_()
    torch.testing.assert_close(attend(attention, query, cache), before)
    assert cache.nbytes > 2 * 3 * 5 * 8 * 8


def test_a_source_takes_the_place_of_another_until_it_is_taken_back() -> None:
    cache = CrossCache()
    cache.update(*tokens(3), torch.tensor([[True, False, False], [False, False, False]]))
    before = cache.state_dict()["tensors"]
    cache.update(*tokens(4))
    assert (cache.length, cache.reuse(2).padding) == (4, None)
    cache.take_back()
    assert cache.length == 4  # `reuse` has put nothing there.
    cache.load_state_dict({"kind": "CrossCache", "tensors": before})
    cache.update(*tokens(4))
    cache.take_back()
    assert same(before, cache.state_dict()["tensors"])


def test_queries_of_another_source_are_counted_from_the_first() -> None:
    cache, query = CrossCache(), torch.zeros(2, 3, 8)
    cache.update(*tokens(3))
    cache.count_queries(query)
    assert cache.next_queries(query).tolist() == [[3, 4, 5]] * 2
    cache.update(*tokens(4))
    assert cache.next_queries(query).tolist() == [[0, 1, 2]] * 2
    cache.take_back()
    assert cache.next_queries(query).tolist() == [[3, 4, 5]] * 2


def test_what_a_fork_remembers_moves_too() -> None:
    cache = CrossCache()
    cache.update(*tokens(3))
    cache.fork()
    cache.to("meta").rollback()
    assert {tensor.device.type for tensor in cache.state_dict()["tensors"].values()} == {"meta"}


def test_refusals_change_nothing() -> None:
    _, cache, _, _ = begun()
    before = cache.state_dict()["tensors"]
    for act, words in (
        (lambda: cache.reorder(torch.tensor([0, 1])), r"index must have shape \(3,\)"),
        (lambda: cache.select(torch.tensor([3])), r"rows must lie in \[0, 3\)"),
        (lambda: cache.crop(-1), "length must not be negative; got -1"),
        (lambda: cache.drop(-1), "count must not be negative; got -1"),
        (cache.rollback, "rollback\\(\\) needs an open fork"),
        (cache.commit, "commit\\(\\) needs an open fork"),
        (lambda: cache.load_state_dict({"kind": "DynamicCache"}), "must be that of a CrossCache"),
        (
            lambda: cache.load_state_dict({"kind": "CrossCache", "tensors": {"prev_key": 1}}),
            r"state\['tensors'\] must be a dict of tensors; got \{'prev_key': 1\}",
        ),
        (
            lambda: cache.load_state_dict({"kind": "CrossCache", "tensors": None}),
            r"state\['tensors'\] must be a dict of tensors; got None",
        ),
        (
            lambda: cache.load_state_dict(
                {"kind": "CrossCache", "tensors": {"prev_key": before["prev_key"]}}
            ),
            "must have \\['prev_key_static', 'prev_value'\\] too",
        ),
        (
            lambda: CrossCache(
                {name: before[name][0] for name in ("prev_key", "prev_value")}
            ).reuse(2),
            r"must hold keys of 2 sequences; got shape \(2, 5, 4\)",
        ),
        (
            lambda: CrossCache({"prev_key": before["prev_key"]}),
            "must hold both of 'prev_key' and 'prev_value', or neither",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            act()
        assert same(before, cache.state_dict()["tensors"])
