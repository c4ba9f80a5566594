"""Decoding with a plain dict: what does not fit is refused, and the state stays as it was."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.nn.decoders import FEATURES, cross, decoder, tokens
from zeta.caches import CrossCache
from zeta.nn import ALiBi, MultiheadAttention


def step(module: MultiheadAttention, state: dict[str, Any], batch: int = 2, **options: Any) -> Any:
    x = tokens(1, batch)
    return module(x, x, x, state, **options)


def filled(module: MultiheadAttention) -> dict[str, Any]:
    state: dict[str, Any] = {}
    x = tokens(3)
    module(x, x, x, state, torch.zeros(2, 3, dtype=torch.bool))
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 3}, r"incremental_state\['prev_key'\] must have shape \(3, 4, length, 4\)"),
        (
            {"key_padding_mask": torch.zeros(2, 2, dtype=torch.bool)},
            r"\(2, 1\) or \(2, 4\); got \(2, 2\)",
        ),
        ({"is_first_step": True}, "is_first_step=True, but incremental_state holds 3 tokens"),
        ({"attn_mask": torch.zeros(1, 3)}, r"attn_mask must have shape \(1, 4\), .*; got \(1, 3\)"),
        ({"rel_pos": ALiBi(3)}, "rel_pos must be for 4 heads; got one for 3"),
    ],
)
def test_refused_step_leaves_the_state_as_it_was(change: dict[str, Any], message: str) -> None:
    module = decoder()
    state = filled(module)
    before = dict(state)
    with pytest.raises(ValueError, match=message):
        step(module, state, **change)
    assert state.keys() == before.keys()
    assert all(state[key] is tensor for key, tensor in before.items())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s.pop("prev_value"), "both of 'prev_key' and 'prev_value', or neither"),
        (
            lambda s: s.update(prev_key=s["prev_key"].float()),
            "must be torch.float64 on cpu; got torch.float32",
        ),
        (lambda s: s.update(prev_key=s["prev_key"][:, :1]), r"must have shape \(2, 4, length, 4\)"),
        (
            lambda s: s.update(prev_value=s["prev_value"][..., :1]),
            r"'prev_value'\] must have shape",
        ),
        (
            lambda s: s.update(prev_value=s["prev_value"][:, :, :1]),
            "as many values as keys; got 1 and 3",
        ),
        (lambda s: s.update(prev_key=s["prev_key"].flatten(0, 1)), "must have shape"),
    ],
)
def test_spoilt_state_is_refused(spoil: Any, message: str) -> None:
    module = decoder()
    state = filled(module)
    spoil(state)
    with pytest.raises(ValueError, match=message):
        step(module, state)


@pytest.mark.parametrize("name", ["prev_key", "prev_value"])
def test_a_state_of_something_else_than_tensors_is_refused(name: str) -> None:
    state: dict[str, Any] = filled(decoder())
    state[name] = 1
    with pytest.raises(TypeError, match=rf"state\['{name}'\] must be a tensor; got int"):
        step(decoder(), state)


@pytest.mark.parametrize("hidden", [None, torch.zeros(2, 1, dtype=torch.bool)])
@pytest.mark.parametrize("is_cross", [False, True])
@pytest.mark.parametrize(
    ("padding", "message"),
    [
        ([[True]], "must be a tensor; got list"),
        (torch.ones(2, 3, dtype=torch.uint8), "must be bool or floating point; got torch.uint8"),
        (torch.zeros(2, 4, dtype=torch.bool), r"must have shape \(2, 3\); got \(2, 4\)"),
        (torch.zeros(1, 3, dtype=torch.bool), r"must have shape \(2, 3\); got \(1, 3\)"),
        (torch.zeros(3), r"must have shape \(2, 3\); got \(3,\)"),
    ],
)
def test_spoilt_padding_is_refused(
    padding: Any, message: str, is_cross: bool, hidden: Tensor | None
) -> None:
    module = cross() if is_cross else decoder()
    state = filled(module)
    state["prev_key_padding_mask"] = padding
    x = tokens(1)
    source = (None, None) if is_cross else (x, x)
    with pytest.raises((TypeError, ValueError), match=message):
        module(x, *source, state, None if is_cross else hidden)


def test_state_of_another_attention_is_refused() -> None:
    encoder_state: dict[str, Any] = {}
    source = tokens(5)
    cross()(tokens(1), source, source, encoder_state)
    with pytest.raises(ValueError, match="keys of a cross-attention; give each attention its own"):
        step(decoder(), encoder_state)
    with pytest.raises(ValueError, match="length of the cached source, 3; got 5"):
        cross()(tokens(1), source, source, filled(decoder()))
    with pytest.raises(ValueError, match="rotated keys, of an attention with positions"):
        step(decoder(), filled(decoder(**FEATURES["rotary"])))
    for name in ("rotary", "xPos"):
        with pytest.raises(ValueError, match="keys of a self-attention; give each attention its"):
            cross()(tokens(1), None, None, filled(decoder(**FEATURES[name])))


def test_cross_attention_refuses_what_it_cannot_know() -> None:
    with pytest.raises(ValueError, match="key and value must be given"):
        cross()(tokens(1), None, None, {})
    state: dict[str, Any] = {}
    source = tokens(5)
    cross()(tokens(1), source, source, state)
    with pytest.raises(ValueError, match="keys of 3 sequences"):
        cross()(tokens(1, batch=3), None, None, state)
    with pytest.raises(
        ValueError, match=r"key_padding_mask must have shape \(2, 5\); got \(2, 4\)"
    ):
        cross()(tokens(1), None, None, state, torch.zeros(2, 4, dtype=torch.bool))


@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2}])
@pytest.mark.parametrize("make_state", [dict, CrossCache])
def test_encoder_keys_of_another_form_are_refused(
    make_state: Callable[[], Any], options: dict[str, Any]
) -> None:
    module, state, source = cross(**options), make_state(), tokens(5)
    expected = module(tokens(2), source, source, state)[0]
    others: list[tuple[MultiheadAttention, str]] = [
        (cross(num_kv_heads=1), r"'prev_key'\] must have shape \(2, 1, length, 4\)"),
        (cross(head_dim=8, **options), r"'prev_key'\] must have shape \(2, \d, length, 8\)"),
        (cross(**options).float(), "must be torch.float32 on cpu; got torch.float64 on cpu"),
        (cross(**options).bfloat16(), "must be torch.bfloat16 on cpu; got torch.float64 on cpu"),
    ]
    for other, message in others:
        query = tokens(1).to(other.q_proj.weight.dtype)
        with pytest.raises(ValueError, match=message):
            other(query, None, None, state)
    assert module(tokens(2), None, None, state)[0].shape == expected.shape


def test_encoder_values_of_another_length_are_refused() -> None:
    state, source = {}, tokens(5)
    cross()(tokens(1), source, source, state)
    state["prev_value"] = state["prev_value"][:, :, :4]
    with pytest.raises(ValueError, match="as many values as keys; got 4 and 5"):
        cross()(tokens(1), None, None, state)


def test_a_source_kept_under_autocast_is_for_autocast() -> None:
    module, x, source = cross().float(), tokens(2).float(), tokens(5).float()
    wide: dict[str, Any] = {}
    narrow: dict[str, Any] = {}
    module(x, source, source, wide)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, _ = module(x, source, source, narrow)
        assert torch.equal(module(x, None, None, narrow)[0], expected)
        with pytest.raises(ValueError, match=r"be torch\.bfloat16 on cpu; got torch\.float32"):
            module(x, None, None, wide)
    with pytest.raises(ValueError, match=r"be torch\.float32 on cpu; got torch\.bfloat16"):
        module(x, None, None, narrow)


@pytest.mark.parametrize("state", [[], "state", 3, torch.zeros(2)])
def test_something_that_is_no_state_is_refused(state: Any) -> None:
    with pytest.raises(TypeError, match="incremental_state must be a dict or a cache"):
        step(decoder(), state)
    with pytest.raises(TypeError, match="incremental_state must be a dict or a CrossCache"):
        step(cross(), state)
