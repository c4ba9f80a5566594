"""Where Zeta's drop-in for ``torch.nn.MultiheadAttention`` answers otherwise, on purpose."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.integrations import torch_attention
from tests.integrations.torch_attention import BATCH, EMBED, HEADS, SOURCE, TARGET, Case
from zeta import masks
from zeta.integrations.pytorch import MultiheadAttention, adopt
from zeta.integrations.pytorch_calls import padding_value

SELF = Case(shared="all", batch_first=True)


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_a_query_that_sees_nothing_gets_zeros(
    kind: str, need_weights: bool, training: bool
) -> None:
    _, ours = torch_attention.modules(SELF)
    ours.train(training)
    (x, *_) = torch_attention.inputs(SELF)
    hidden = torch.zeros(BATCH, TARGET, dtype=torch.bool)
    hidden[1] = True
    mask = hidden if kind == "bool" else torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)
    out, weights = ours(x, x, x, key_padding_mask=mask, need_weights=need_weights)
    torch.testing.assert_close(out[1], ours.out_proj.bias.expand(TARGET, EMBED))
    others, _ = ours(x[::2], x[::2], x[::2])
    torch.testing.assert_close(out[::2], others)
    if weights is not None:
        assert not weights[1].any()
    for gradient in torch.autograd.grad(out.square().sum(), [x, *ours.parameters()]):
        assert gradient.isfinite().all()


def test_torch_itself_gives_nan_there() -> None:
    # The reason for the test above; by another path it gives numbers.
    theirs, _ = torch_attention.modules(SELF)
    (x, *_) = torch_attention.inputs(SELF)
    hidden = torch.ones(BATCH, TARGET, dtype=torch.bool)
    assert theirs(x, x, x, key_padding_mask=hidden)[0].isnan().all()
    assert not theirs(x, x, x, key_padding_mask=hidden, need_weights=False)[0].isnan().any()


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_is_causal_alone_is_causal(grad: bool, training: bool, need_weights: bool) -> None:
    theirs, ours = torch_attention.modules(SELF)
    ours.train(training)
    (x, *_) = torch_attention.inputs(SELF)
    later = torch.ones(TARGET, TARGET).triu(1).bool()
    with torch.set_grad_enabled(grad):
        out, weights = ours(x, x, x, is_causal=True, need_weights=need_weights)
        expected, expected_weights = theirs(x, x, x, attn_mask=later)
    torch.testing.assert_close(out, expected)
    if weights is not None:
        torch.testing.assert_close(weights.clone(), expected_weights)


def test_is_causal_alone_ends_where_the_keys_end() -> None:
    theirs, ours = torch_attention.modules(Case())
    query, key, value = torch_attention.inputs(Case())
    later = torch.ones(TARGET, SOURCE).triu(SOURCE - TARGET + 1).bool()
    out, _ = ours(query, key, value, is_causal=True)
    torch.testing.assert_close(out, theirs(query, key, value, attn_mask=later)[0])


@pytest.mark.parametrize("num_extra", [1, 2])
def test_is_causal_shows_the_modules_own_keys(num_extra: int) -> None:
    case = Case(add_bias_kv=True, add_zero_attn=num_extra == 2)
    theirs, ours = torch_attention.modules(case)
    query, key, value = torch_attention.inputs(case)
    later = torch.ones(TARGET, SOURCE).triu(SOURCE - TARGET + 1).bool()
    found = ours(query, key, value, is_causal=True)
    expected = theirs(query, key, value, attn_mask=later)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.clone(), other)
    assert found[1].shape[-1] == SOURCE + num_extra


def test_a_hint_is_taken_for_a_square_mask_only() -> None:
    _, ours = torch_attention.modules(Case())
    query, key, value = torch_attention.inputs(Case())
    mask = torch.rand(TARGET, SOURCE) > 0.5
    mask[:, 0] = False
    out, _ = ours(query, key, value, attn_mask=mask, is_causal=True)
    torch.testing.assert_close(out, ours(query, key, value, attn_mask=mask)[0])
    square = key[:TARGET]
    out, _ = ours(query, square, square, attn_mask=mask[:, :TARGET], is_causal=True)
    torch.testing.assert_close(out, ours(query, square, square, is_causal=True)[0])


def test_a_mask_that_learns_is_no_causal_mask() -> None:
    _, ours = torch_attention.modules(SELF)
    (x, *_) = torch_attention.inputs(SELF)
    mask = torch.randn(TARGET, TARGET, dtype=torch.float64, requires_grad=True)
    out, _ = ours(x, x, x, attn_mask=mask, is_causal=True)
    torch.testing.assert_close(out, ours(x, x, x, attn_mask=mask)[0])


def values_of(module: nn.MultiheadAttention, value: Tensor) -> Tensor:
    """Projected values, ``(B, H, S, D)``, of a packed module with ``batch_first``."""
    weight, bias = module.in_proj_weight[-EMBED:], module.in_proj_bias[-EMBED:]
    return F.linear(value, weight, bias).unflatten(-1, (HEADS, -1)).transpose(1, 2)


def from_weights(module: nn.MultiheadAttention, weights: Tensor, value: Tensor) -> Tensor:
    """The output that these weights, ``(B, H, T, S)``, give."""
    heads = weights @ values_of(module, value)
    return module.out_proj(heads.transpose(1, 2).flatten(2))


def test_weights_in_training_are_those_before_dropout() -> None:
    theirs, ours = torch_attention.modules(SELF, dropout=0.5)
    (x, *_) = torch_attention.inputs(SELF)
    out, weights = ours(x, x, x, average_attn_weights=False)
    expected = theirs.eval()(x, x, x, average_attn_weights=False)
    torch.testing.assert_close(weights.clone(), expected[1])
    assert not torch.allclose(out, expected[0])


@pytest.mark.parametrize("average", [True, False])
def test_torchs_weights_are_those_after_dropout(average: bool) -> None:
    _, ours = torch_attention.modules(SELF, dropout=0.5, weights="torch")
    (x, *_) = torch_attention.inputs(SELF)
    torch.manual_seed(0)
    out, weights = ours(x, x, x, average_attn_weights=average)
    torch.manual_seed(0)
    again, heads = ours(x, x, x, average_attn_weights=False)
    torch.testing.assert_close(again, out)
    torch.testing.assert_close(from_weights(ours, heads, x), out)
    assert 0.2 < (heads == 0).double().mean() < 0.8
    expected = heads.clone().mean(1) if average else heads.clone()
    torch.testing.assert_close(weights.clone(), expected)
    gradients = [
        torch.autograd.grad((w * torch_attention.wave(w)).sum(), x) for w in (weights, expected)
    ]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("average", [True, False])
def test_torchs_weights_in_parts(average: bool) -> None:
    _, ours = torch_attention.modules(SELF, dropout=0.5, weights="torch")
    (x, *_) = torch_attention.inputs(SELF)
    _, weights = ours(x, x, x, average_attn_weights=average)
    row = weights.rows(2)
    head = None if average else weights.heads(1)
    mean = None if average else weights.mean(1)
    if average:
        assert not weights.materialized
    whole = weights.clone()
    torch.testing.assert_close(row, whole[..., 2, :])
    if head is not None:
        torch.testing.assert_close(head, whole[:, 1])
        torch.testing.assert_close(mean, whole.mean(1))


def test_torchs_weights_in_eval_are_the_weights() -> None:
    _, ours = torch_attention.modules(SELF, dropout=0.5, weights="torch")
    (x, *_) = torch_attention.inputs(SELF)
    ours.eval()
    torch.testing.assert_close(ours(x, x, x)[1].sum(-1), torch.ones(BATCH, TARGET).double())


def test_averaged_weights_after_dropout_never_hold_all_heads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from zeta.integrations import pytorch_calls

    shapes: list[tuple[int, ...]] = []
    compute = pytorch_calls.run_weights

    def watched(call: Any) -> Tensor:
        weights = compute(call)
        shapes.append(tuple(weights.shape))
        return weights

    _, ours = torch_attention.modules(SELF, dropout=0.5, weights="torch")
    (x, *_) = torch_attention.inputs(SELF)
    monkeypatch.setattr(pytorch_calls, "run_weights", watched)
    with torch.no_grad():
        ours(x, x, x)[1].sum()
    assert shapes == [(BATCH, 1, TARGET, TARGET)] * HEADS


def test_masks_of_two_types_are_no_matter_for_a_warning() -> None:
    case = Case(attn_mask="float 2", key_padding_mask="bool")
    theirs, ours = torch_attention.modules(case)
    tensors, given = torch_attention.inputs(case), torch_attention.masks(case)
    ours(*tensors, **given)
    with pytest.warns(UserWarning, match="Support for mismatched"):
        theirs(*tensors, **given)


def mask_of(*rows: str, dtype: torch.dtype = torch.bool) -> Tensor:
    hidden = torch.tensor([[mark == "x" for mark in row] for row in rows])
    if dtype == torch.bool:
        return hidden
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, -torch.inf)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_padding_at_the_end_is_lengths(dtype: torch.dtype) -> None:
    found = padding_value(mask_of("...xx", ".....", "xxxxx", dtype=dtype))
    assert isinstance(found, masks.Padding)
    assert found.lengths.tolist() == [3, 5, 0]


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_padding_elsewhere_is_a_mask(dtype: torch.dtype) -> None:
    for rows in (("...xx", "xx..."), (".x.x.", "....x")):
        found = padding_value(mask_of(*rows, dtype=dtype))
        assert isinstance(found, masks.Dense)
        assert torch.equal(found.tensor[:, 0, 0], ~mask_of(*rows))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_padding_that_hides_nothing_is_no_mask(dtype: torch.dtype) -> None:
    assert padding_value(mask_of(".....", ".....", dtype=dtype)) is None


def test_numbers_are_added() -> None:
    for number in (-1e9, 0.5, float("nan"), float("inf")):
        given = mask_of("...xx", ".....", dtype=torch.float32)
        given[0, 0] = number
        assert padding_value(given).tensor.data_ptr() == given.data_ptr()


def test_numbers_that_learn_are_added() -> None:
    given = mask_of("...xx", dtype=torch.float32).requires_grad_()
    assert padding_value(given).tensor.requires_grad


def test_a_mask_without_numbers_is_not_read() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    assert isinstance(padding_value(mask_of("...xx").to("meta")), masks.Dense)
    with FakeTensorMode() as mode:
        assert isinstance(padding_value(mode.from_tensor(mask_of("...xx"))), masks.Dense)


QUERY = torch.zeros(TARGET, BATCH, EMBED)
KEY = torch.zeros(SOURCE, BATCH, EMBED)

WRONG: dict[str, tuple[Callable[..., Any], type[Exception], str]] = {
    "query is no tensor": (
        lambda m: m([1.0], KEY, KEY), TypeError, "query must be a tensor; got list",
    ),
    "features of the query": (
        lambda m: m(QUERY[..., :3], KEY, KEY), ValueError,
        "query must have shape (length, 8) or (length, batch, 8); got (5, 3, 3)",
    ),
    "features of the key": (
        lambda m: m(QUERY, KEY[..., :3], KEY), ValueError,
        "key must have shape (length, batch, 8); got (7, 3, 3)",
    ),
    "an unbatched key": (
        lambda m: m(QUERY, KEY[:, 0], KEY[:, 0]), ValueError,
        "key must have shape (length, batch, 8); got (7, 8)",
    ),
    "a batched key": (
        lambda m: m(QUERY[:, 0], KEY, KEY), ValueError,
        "key must have shape (length, 8); got (7, 3, 8)",
    ),
    "four dimensions": (
        lambda m: m(QUERY[None], KEY[None], KEY[None]), ValueError,
        "query must have shape (length, 8) or (length, batch, 8); got (1, 5, 3, 8)",
    ),
    "lengths of key and value": (
        lambda m: m(QUERY, KEY, KEY[1:]), ValueError,
        "key and value must have one length and batch size; got (7, 3, 8) and (6, 3, 8)",
    ),
    "batches": (
        lambda m: m(QUERY, KEY[:, 1:], KEY[:, 1:]), ValueError,
        "query and key must have one batch size; got 3 and 2",
    ),
    "attn_mask is no tensor": (
        lambda m: m(QUERY, KEY, KEY, attn_mask=[True]), TypeError,
        "attn_mask must be a tensor or None; got list",
    ),
    "shape of attn_mask": (
        lambda m: m(QUERY, KEY, KEY, attn_mask=torch.zeros(3, 5, 7)), ValueError,
        "attn_mask must have shape (5, 7) or (6, 5, 7); got (3, 5, 7)",
    ),
    "type of attn_mask": (
        lambda m: m(QUERY, KEY, KEY, attn_mask=torch.zeros(5, 7).int()), TypeError,
        "attn_mask must be bool or floating point; got torch.int32",
    ),
    "device of attn_mask": (
        lambda m: m(QUERY, KEY, KEY, attn_mask=torch.zeros(5, 7, device="meta")), ValueError,
        "attn_mask must be on the query's device cpu; got meta",
    ),
    "key_padding_mask is no tensor": (
        lambda m: m(QUERY, KEY, KEY, key_padding_mask=1), TypeError,
        "key_padding_mask must be a tensor or None; got int",
    ),
    "shape of key_padding_mask": (
        lambda m: m(QUERY, KEY, KEY, torch.zeros(7, 3)), ValueError,
        "key_padding_mask must have shape (3, 7); got (7, 3)",
    ),
    "shape of key_padding_mask, unbatched": (
        lambda m: m(QUERY[:, 0], KEY[:, 0], KEY[:, 0], torch.zeros(1, 7)), ValueError,
        "key_padding_mask must have shape (7,); got (1, 7)",
    ),
    "type of key_padding_mask": (
        lambda m: m(QUERY, KEY, KEY, torch.zeros(3, 7).int()), TypeError,
        "key_padding_mask must be bool or floating point; got torch.int32",
    ),
    "device of key_padding_mask": (
        lambda m: m(QUERY, KEY, KEY, torch.zeros(3, 7, device="meta")), ValueError,
        "key_padding_mask must be on the query's device cpu; got meta",
    ),
    "is_causal is no flag": (
        lambda m: m(QUERY, QUERY, QUERY, is_causal="no"), TypeError,
        "is_causal must be True or False; got 'no'",
    ),
    "need_weights is no flag": (
        lambda m: m(QUERY, KEY, KEY, need_weights="mean"), TypeError,
        "need_weights must be True or False; got 'mean'",
    ),
    "average_attn_weights is no flag": (
        lambda m: m(QUERY, KEY, KEY, average_attn_weights="no"), TypeError,
        "average_attn_weights must be True or False; got 'no'",
    ),
    "dtype of the query": (
        lambda m: m(QUERY.double(), KEY, KEY), TypeError,
        "query must have the parameters' dtype torch.float32; got torch.float64",
    ),
    "dtype of the value": (
        lambda m: m(QUERY, KEY, KEY.half()), TypeError,
        "value must have the parameters' dtype torch.float32; got torch.float16",
    ),
    "device of the key": (
        lambda m: m(QUERY, KEY.to("meta"), KEY), ValueError,
        "key must be on the parameters' device cpu; got meta",
    ),
    "dropout": (
        lambda m: type(m)(8, 2, dropout=1.0), ValueError, "dropout must be in [0, 1); got 1.0",
    ),
    "weights": (
        lambda m: type(m)(8, 2, weights="mean"), ValueError,
        "weights must be 'zeta' or 'torch'; got 'mean'",
    ),
    "a module that drops everything": (
        lambda m: adopt(nn.MultiheadAttention(8, 2, dropout=1.0)), ValueError,
        "this module cannot be computed by Zeta: its dropout must be in [0, 1); got 1.0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(name: str) -> None:
    call, error, message = WRONG[name]
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call(MultiheadAttention(EMBED, HEADS))


def test_the_shapes_follow_batch_first() -> None:
    module = MultiheadAttention(EMBED, HEADS, batch_first=True)
    words = "query must have shape (length, 8) or (batch, length, 8); got (5, 3, 1)"
    with pytest.raises(ValueError, match=re.escape(words)):
        module(QUERY[..., :1], KEY, KEY)
    with pytest.raises(ValueError, match="query and key must have one batch size; got 5 and 7"):
        module(QUERY, KEY, KEY)
