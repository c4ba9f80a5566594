"""Decoding with a plain dict: in any steps, with padding and biases, it equals the full pass."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.nn.decoders import EXACT, FEATURES, H, T, cross, decode, decoder, tokens
from zeta.nn import ALiBi, RelativePositionBias


@settings(max_examples=20)
@given(data=st.data())
@pytest.mark.parametrize("name", FEATURES)
def test_any_chunks_equal_the_full_pass(name: str, data: st.DataObject) -> None:
    module, x = decoder(**FEATURES[name]), tokens()
    sizes = data.draw(chunk_sizes())
    options = {"split_position": data.draw(st.integers(-1, T))} if name == "multiway" else {}
    expected, _ = module(x, x, x, is_causal=True, **options)
    torch.testing.assert_close(decode(module, x, sizes, **options), expected, **EXACT)


@st.composite
def chunk_sizes(draw: st.DrawFn, length: int = T) -> list[int]:
    """Positive numbers that add up to ``length``."""
    borders = draw(st.sets(st.integers(1, length - 1)))
    edges = [0, *sorted(borders), length]
    return [after - before for before, after in itertools.pairwise(edges)]


@settings(max_examples=20)
@given(sizes=chunk_sizes(), which=st.sampled_from(["T5", "T5 both ways", "ALiBi"]))
def test_any_chunks_with_a_position_bias(sizes: list[int], which: str) -> None:
    module, x = decoder(), tokens()
    options = {"num_buckets": 8, "max_distance": 6, "n_heads": H, "dtype": torch.float64}
    bias = ALiBi(H) if which == "ALiBi" else RelativePositionBias(which != "T5", **options)
    expected, _ = module(x, x, x, rel_pos=bias, is_causal=True)
    torch.testing.assert_close(decode(module, x, sizes, rel_pos=bias), expected, **EXACT)


@settings(max_examples=20)
@given(sizes=chunk_sizes(), side=st.sampled_from(["left", "right", "inside"]), data=st.data())
@pytest.mark.parametrize("name", ["plain", "xPos", "grouped heads"])
def test_any_chunks_with_padding(
    name: str, sizes: list[int], side: str, data: st.DataObject
) -> None:
    module, x = decoder(**FEATURES[name]), tokens()
    padding = torch.zeros(2, T, dtype=torch.bool)
    count = data.draw(st.integers(0, T))
    padding[1] = {
        "left": torch.arange(T) < count,
        "right": torch.arange(T) >= T - count,
        "inside": torch.arange(T) % 3 == 1,
    }[side]
    expected, _ = module(x, x, x, key_padding_mask=padding, is_causal=True)
    state: dict[str, Any] = {}
    outs = []
    for part, part_padding in zip(x.split(sizes, 1), padding.split(sizes, 1), strict=True):
        # A chunk without padding may come without a mask.
        mask = part_padding if part_padding.any() or data.draw(st.booleans()) else None
        outs.append(module(part, part, part, state, mask, is_causal=True)[0])
    torch.testing.assert_close(torch.cat(outs, 1), expected, **EXACT)


@pytest.mark.parametrize("name", ["plain", "xPos"])
def test_prefill_needs_no_mark_of_the_first_step(name: str) -> None:
    module, x = decoder(**FEATURES[name]), tokens()
    expected, _ = module(x, x, x, is_causal=True)
    for mark in (False, True):
        state: dict[str, Any] = {}
        prefix, token = x[:, :-1], x[:, -1:]
        first, _ = module(prefix, prefix, prefix, state, is_first_step=mark, is_causal=True)
        torch.testing.assert_close(first, expected[:, :-1], **EXACT)
        last, _ = module(token, token, token, state)
        torch.testing.assert_close(last, expected[:, -1:], **EXACT)


def test_single_query_sees_every_cached_key_under_the_causal_flag() -> None:
    module, x = decoder(), tokens()
    state: dict[str, Any] = {}
    module(x[:, :-1], x[:, :-1], x[:, :-1], state, is_causal=True)
    _, weights = module(x[:, -1:], x[:, -1:], x[:, -1:], state, is_causal=True)
    assert weights.shape == (H, 2, 1, T)
    assert (weights > 0).all()


def test_mask_of_one_step_covers_the_cache() -> None:
    module, x = decoder(), tokens()
    state: dict[str, Any] = {}
    module(x[:, :-1], x[:, :-1], x[:, :-1], state)
    token, hidden = x[:, -1:], torch.zeros(1, T, dtype=torch.bool)
    hidden[0, 2] = True
    _, weights = module(token, token, token, state, attn_mask=hidden)
    assert not weights[..., 2].any()
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), **EXACT)


def test_state_is_readable_and_has_the_documented_shapes() -> None:
    module, x = decoder(num_kv_heads=2), tokens()
    state: dict[str, Any] = {}
    for t in range(T):
        token = x[:, t : t + 1]
        module(token, token, token, state)
        assert state["prev_key"].shape == state["prev_value"].shape == (2, 2, t + 1, 4)
    assert set(state) == {"prev_key", "prev_value"}


@pytest.mark.parametrize("name", ["plain", "xPos"])
def test_state_of_torchscale_is_taken_over(name: str) -> None:
    """TorchScale's holds two tensors, the keys as they are before xPos."""
    module, x = decoder(**FEATURES[name]), tokens()
    prefix, token = x[:, :-1], x[:, -1:]

    def heads(t: Tensor) -> Tensor:
        return t.unflatten(-1, (H, -1)).transpose(1, 2)

    state = {"prev_key": heads(module.k_proj(prefix)), "prev_value": heads(module.v_proj(prefix))}
    expected, _ = module(x, x, x, is_causal=True)
    found, _ = module(token, token, token, state)
    torch.testing.assert_close(found, expected[:, -1:], **EXACT)
    again, _ = module(token, token, token, state)
    longer = torch.cat((x, token), 1)
    expected, _ = module(longer, longer, longer, is_causal=True)
    torch.testing.assert_close(again, expected[:, -1:], **EXACT)


@settings(max_examples=20)
@given(sizes=chunk_sizes(), data=st.data())
@pytest.mark.parametrize("name", ["plain", "xPos", "multiway"])
def test_beams_are_reordered_by_indexing_every_entry(
    name: str, sizes: list[int], data: st.DataObject
) -> None:
    module, x = decoder(**FEATURES[name]), tokens(batch=3)
    padding = torch.zeros(3, T, dtype=torch.bool)
    padding[1, 0] = True
    state: dict[str, Any] = {}
    history, history_padding = x[:, :0], padding[:, :0]
    for part, part_padding in zip(x.split(sizes, 1), padding.split(sizes, 1), strict=True):
        out, _ = module(part, part, part, state, part_padding, is_causal=True)
        history = torch.cat((history, part), 1)
        history_padding = torch.cat((history_padding, part_padding), 1)
        expected, _ = module(
            history, history, history, key_padding_mask=history_padding, is_causal=True
        )
        torch.testing.assert_close(out, expected[:, -part.shape[1] :], **EXACT)
        order = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=3, max_size=3)))
        state = {key: tensor.index_select(0, order) for key, tensor in state.items()}
        history, history_padding = history[order], history_padding[order]


def test_padding_for_all_tokens_replaces_what_was_remembered() -> None:
    module, x = decoder(), tokens()
    padding = torch.zeros(2, T, dtype=torch.bool)
    padding[0, 1] = padding[1, :3] = True
    expected, _ = module(x, x, x, key_padding_mask=padding, is_causal=True)
    state: dict[str, Any] = {}
    outs = [
        module(p, p, p, state, padding[:, :end], is_causal=True)[0]
        for p, end in zip(x.split([4, 3, 2], 1), (4, 7, 9), strict=True)
    ]
    torch.testing.assert_close(torch.cat(outs, 1), expected, **EXACT)


def test_bool_and_float_padding_can_follow_each_other() -> None:
    module, x = decoder(), tokens()
    hidden = torch.zeros(2, 4, dtype=torch.bool)
    hidden[:, 1] = True
    added = torch.randn(2, T - 4, dtype=torch.float64)
    whole = torch.zeros(2, 4, dtype=torch.float64).masked_fill(hidden, float("-inf"))
    whole = torch.cat((whole, added), 1)
    expected, _ = module(x, x, x, key_padding_mask=whole, is_causal=True)
    state: dict[str, Any] = {}
    first, second = x[:, :4], x[:, 4:]
    module(first, first, first, state, hidden, is_causal=True)
    found, _ = module(second, second, second, state, added, is_causal=True)
    torch.testing.assert_close(found, expected[:, 4:], **EXACT)


def test_training_through_the_cache_gives_the_gradients_of_the_full_pass() -> None:
    module, x = decoder(), tokens()
    parameters = list(module.parameters())
    expected = torch.autograd.grad(module(x, x, x, is_causal=True)[0].square().sum(), parameters)
    found = torch.autograd.grad(decode(module, x, [4, 1, 4]).square().sum(), parameters)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_encoder_keys_are_projected_once_and_padding_is_remembered() -> None:
    module, query, source = cross(), tokens(), tokens(5)
    padding = torch.tensor([[False] * 5, [False, False, True, True, True]])
    expected, _ = module(query, source, source, key_padding_mask=padding)
    projected: list[str] = []
    for name in ("k_proj", "v_proj"):
        module.get_submodule(name).register_forward_hook(
            lambda part, inputs, output, name=name: projected.append(name)
        )
    state: dict[str, Any] = {}
    outs = []
    for t in range(T):
        key, mask = ((source, padding), (source, None), (None, None))[min(t, 2)]
        out, weights = module(query[:, t : t + 1], key, key, state, mask)
        assert weights.shape == (H, 2, 1, 5)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), expected, **EXACT)
    assert projected == ["k_proj", "v_proj"]
    assert state["prev_key"].shape == (2, H, 5, 4)


def test_cross_attention_beams_are_reordered_by_indexing_every_entry() -> None:
    module, query, source = cross(), tokens(), tokens(5)
    padding = torch.tensor([[False] * 5, [False, False, True, True, True]])
    state: dict[str, Any] = {}
    module(query[:, :1], source, source, state, padding)
    order = torch.tensor([1, 1])
    state = {key: tensor.index_select(0, order) for key, tensor in state.items()}
    found, _ = module(query, None, None, state)
    expected, _ = module(query, source[order], source[order], key_padding_mask=padding[order])
    torch.testing.assert_close(found, expected, **EXACT)
