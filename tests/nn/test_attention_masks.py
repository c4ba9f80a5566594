"""The module's masks and biases against the textbook: every form, empty rows, NaN."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.nn import textbook
from tests.nn.attentions import EXACT, B, E, H, S, T, check_same, check_same_gradients, make, tokens
from zeta import biases, masks
from zeta.nn import ALiBi, RelativePositionBias


def dense_masks() -> dict[str, Tensor]:
    """Of each accepted shape, True: hidden. No row is empty."""
    shapes = {
        "T, S": (T, S),
        "B, T, S": (B, T, S),
        "B * H, T, S": (B * H, T, S),
        "1, 1, T, S": (1, 1, T, S),
        "B, 1, T, S": (B, 1, T, S),
        "1, H, T, S": (1, H, T, S),
        "B, H, T, S": (B, H, T, S),
    }
    generator = torch.Generator().manual_seed(0)
    found = {name: torch.rand(shape, generator=generator) < 0.4 for name, shape in shapes.items()}
    for mask in found.values():
        mask[..., 3] = False
    return found


def over_scores(tensor: Tensor) -> Tensor:
    """A mask of any accepted shape over ``(B, H, T, S)``."""
    if tensor.dim() == 2:
        return tensor.expand(B, H, T, S)
    if tensor.dim() == 3:
        tensor = tensor[:, None] if tensor.shape[0] == B else tensor.unflatten(0, (B, H))
    return tensor.expand(B, H, T, S)


@pytest.mark.parametrize("name", dense_masks())
@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2}], ids=["plain", "grouped heads"])
def test_bool_mask_of_every_shape_hides(name: str, options: dict[str, Any]) -> None:
    module, hidden = make(**options), dense_masks()[name]
    query, source = tokens(T), tokens(S)
    out, weights = module(query, source, source, attn_mask=hidden)
    visible = ~over_scores(hidden)
    check_same((out, weights), textbook.attend(module, query, source, source, visible=visible))
    assert not weights.transpose(0, 1)[~visible].any()


@pytest.mark.parametrize("name", dense_masks())
def test_float_mask_of_every_shape_is_added_and_gets_its_gradient(name: str) -> None:
    module = make()
    mask = torch.randn(dense_masks()[name].shape, dtype=torch.float64).requires_grad_()
    query, source = tokens(T), tokens(S)
    expected = textbook.attend(module, query, source, source, bias=over_scores(mask))
    check_same_gradients(module(query, source, source, attn_mask=mask), expected, [mask])


@pytest.mark.parametrize("shape", [(B * H, T, S), (H, T, S), (1, H, T, S), (B, H, T, S)], ids=str)
def test_relative_position_tensor_of_every_shape(shape: tuple[int, ...]) -> None:
    module = make()
    rel_pos = torch.randn(shape, dtype=torch.float64).requires_grad_()
    query, source = tokens(T), tokens(S)
    bias = rel_pos.unflatten(0, (-1, H)) if len(shape) == 3 else rel_pos
    expected = textbook.attend(module, query, source, source, bias=bias)
    check_same_gradients(module(query, source, source, rel_pos=rel_pos), expected, [rel_pos])


def test_padding_mask_hides_and_a_float_one_is_added() -> None:
    module, query, source = make(), tokens(T), tokens(S)
    padding = torch.arange(S) >= torch.tensor([[7], [4], [1]])
    expected = textbook.attend(module, query, source, source, visible=~padding[:, None, None])
    check_same(module(query, source, source, key_padding_mask=padding), expected)
    added = torch.randn(B, S, dtype=torch.float64).requires_grad_()
    expected = textbook.attend(module, query, source, source, bias=added[:, None, None])
    found = module(query, source, source, key_padding_mask=added)
    check_same_gradients(found, expected, [added])


def test_mild_float_padding_mask_does_not_hide() -> None:
    module, x = make(), tokens(T)
    mild = torch.zeros(B, T, dtype=torch.float64)
    mild[:, -1] = -1.0
    _, weights = module(x, x, x, key_padding_mask=mild)
    assert (weights[..., -1] > 0).all()


def test_everything_at_once() -> None:
    module, query, source = make(num_kv_heads=2), tokens(T), tokens(S)
    hidden, added = dense_masks()["B, T, S"], torch.randn(H, T, S, dtype=torch.float64)
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[1, 0] = True
    visible = textbook.causal(T, S) & ~hidden[:, None] & ~padding[:, None, None]
    expected = textbook.attend(module, query, source, source, visible=visible, bias=added)
    found = module(
        query, source, source, key_padding_mask=padding, attn_mask=hidden, rel_pos=added,
        is_causal=True,
    )  # fmt: skip
    check_same(found, expected)


@pytest.mark.parametrize("target", [S, T, 1])
def test_causal_flag_works_alone_and_aligns_queries_with_the_last_keys(target: int) -> None:
    module, query, source = make(), tokens(target), tokens(S)
    expected = textbook.attend(module, query, source, source, visible=textbook.causal(target, S))
    check_same(module(query, source, source, is_causal=True), expected)


@pytest.mark.parametrize("window", [1, 3, S, 100])
@pytest.mark.parametrize("target", [S, T, 1])
def test_window(window: int, target: int) -> None:
    module, query, source = make(window=window), tokens(target), tokens(S)
    visible = textbook.causal(target, S).triu(S - target - window + 1)
    expected = textbook.attend(module, query, source, source, visible=visible)
    for is_causal in (False, True):
        check_same(module(query, source, source, is_causal=is_causal), expected)


def test_mask_and_bias_values_are_taken() -> None:
    module, x = make(), tokens(T)
    lengths, slopes = torch.tensor([5, 3, 1]), torch.rand(H, dtype=torch.float64)
    mask = masks.Causal() & masks.Padding(lengths)
    bias = biases.Softcap(2.0) + biases.Alibi(slopes)
    _, weights = module(x, x, x, attn_mask=mask, rel_pos=bias)
    q, k = (textbook.heads(p(x), module.head_dim) for p in (module.q_proj, module.k_proj))
    scores = 2.0 * torch.tanh(q @ k.mT * module.scale / 2.0)
    distance = (torch.arange(T) - torch.arange(T)[:, None]).abs()
    scores = scores - slopes[:, None, None] * distance
    visible = textbook.causal(T, T) & (torch.arange(T) < lengths[:, None, None, None])
    torch.testing.assert_close(
        torch.as_tensor(weights), textbook.softmax(scores, visible).transpose(0, 1), **EXACT
    )


@pytest.mark.parametrize("bidirectional", [True, False])
def test_relative_position_bias_module(bidirectional: bool) -> None:
    rel_pos = RelativePositionBias(
        bidirectional, num_buckets=8, max_distance=6, n_heads=H, dtype=torch.float64
    )
    module, x = make(self_attention=True), tokens(12)
    dense = rel_pos(B, 12, 12)
    visible = textbook.causal(12, 12)
    expected = textbook.attend(module, x, x, x, visible=visible, bias=dense.unflatten(0, (B, H)))
    found = module(x, x, x, rel_pos=rel_pos, is_causal=True)
    check_same_gradients(found, expected, list(rel_pos.parameters()))


def test_alibi_module() -> None:
    alibi, module, x = ALiBi(H), make(self_attention=True), tokens(12)
    bias = alibi(B, 12, 12).unflatten(0, (B, H)).double()
    check_same(module(x, x, x, rel_pos=alibi), textbook.attend(module, x, x, x, bias=bias))


def test_row_with_every_key_hidden_is_zero_and_poisons_no_gradient() -> None:
    module, x = make(), tokens(T).requires_grad_()
    hidden = torch.zeros(T, T, dtype=torch.bool)
    hidden[2] = True
    as_float = torch.zeros(T, T, dtype=torch.float64).masked_fill(hidden, float("-inf"))
    for mask in (hidden, as_float):
        out, weights = module(x, x, x, attn_mask=mask)
        assert not weights[:, :, 2].any()
        torch.testing.assert_close(out[:, 2], module.out_proj.bias.expand(B, E), **EXACT)
        gradients = torch.autograd.grad(
            out.sum() + weights.square().sum(), [x, *module.parameters()]
        )
        assert all(gradient.isfinite().all() for gradient in gradients)


def test_left_padding_with_a_causal_mask_is_finite_and_right() -> None:
    module, x = make(self_attention=True), tokens(T)
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[:, :2] = True
    out, weights = module(x, x, x, key_padding_mask=padding, is_causal=True)
    assert out.isfinite().all()
    assert not weights[:, :, :2].any()
    alone = module(x[:, 2:], x[:, 2:], x[:, 2:], is_causal=True)
    check_same((out[:, 2:], weights[:, :, 2:, 2:]), alone)


def test_sequence_that_is_all_padding_is_zero() -> None:
    module, x = make(), tokens(T)
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[1] = True
    out, weights = module(x, x, x, key_padding_mask=padding)
    assert not weights[:, 1].any()
    torch.testing.assert_close(out[1], module.out_proj.bias.expand(T, E), **EXACT)


def test_nan_passes_through_with_and_without_a_mask() -> None:
    module, x = make(), tokens(T)
    x[0, 1, 0] = float("nan")
    for attn_mask in (None, torch.zeros(T, T, dtype=torch.float64)):
        out, _ = module(x, x, x, attn_mask=attn_mask)
        assert out[0].isnan().all()
        assert out[1:].isfinite().all()


def test_mask_that_hides_nothing_changes_nothing() -> None:
    module, x = make(), tokens(T)
    plain = module(x, x, x)
    for mask in (torch.zeros(T, T, dtype=torch.bool), torch.zeros(T, T, dtype=torch.float64)):
        check_same(module(x, x, x, attn_mask=mask), plain)


def test_half_precision_mask_of_minus_infinity() -> None:
    """-1e9 is -inf in float16: a causal mask made so must not give NaN."""
    module = make(dtype=torch.float32).half()
    x = tokens(T, dtype=torch.float32).half()
    mask = (torch.ones(T, T).triu() * -1e9).half()
    mask[torch.ones(T, T).tril(-1) > 0] = 0.0
    out, weights = module(x, x, x, attn_mask=mask)
    assert out.isfinite().all()
    assert not weights[:, :, 0].any()
