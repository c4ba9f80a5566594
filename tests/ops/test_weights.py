"""Lazy weights: their numbers and gradients, and the questions answered in part."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.ops import cases
from tests.ops.cases import Case
from tests.ops.lazy import Counted, Small
from zeta import masks
from zeta.ops import weights as weights_module
from zeta.ops.attention import run_weights
from zeta.ops.call import AttentionCall
from zeta.ops.weights import LazyWeights, lazy_weights

# Long ones test backends, not laziness.
CASES = [case for case in cases.CASES if not case.dropout_p and case.target <= 10]


def made_call(case: Case, result: str = "weights") -> tuple[AttentionCall, cases.Made]:
    made = case.tensors(torch.float64)
    arguments = case.arguments(made)
    del arguments["dropout_p"], arguments["seed"]
    key = made["key"]
    del made["value"]
    return AttentionCall.checked(made["query"], key, key, result=result, **arguments), made


def gradients(output: Tensor, made: cases.Made) -> list[Tensor]:
    coefficients = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view(output.shape)
    return list(torch.autograd.grad((output * coefficients).sum(), list(made.values())))


def assert_same(lazily: Tensor, plainly: Tensor, made: cases.Made) -> None:
    assert type(lazily) is Tensor
    torch.testing.assert_close(lazily, plainly)
    torch.testing.assert_close(gradients(lazily, made), gradients(plainly, made))


LAYOUTS = [("weights", False), ("weights", True), ("mean_weights", True)]


@pytest.mark.parametrize(("result", "heads_first"), LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_numbers_and_gradients_are_those_of_the_call(
    case: Case, result: str, heads_first: bool
) -> None:
    call, made = made_call(case, result)
    plain = run_weights(call, "reference")
    if heads_first and result == "weights":
        plain = plain.transpose(0, 1)
    weights = lazy_weights(call, Counted(), heads_first=heads_first)
    assert isinstance(weights, LazyWeights)
    assert weights.stride() == plain.stride()
    assert_same(weights + 0, plain, made)


PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "row": lambda w: w[..., 2, :],
    "last row": lambda w: w[..., -1, :],
    "rows slice": lambda w: w[..., 1:6:2, :],
    "rows list": lambda w: w[..., [3, 0, 3], :],
    "rows tensor": lambda w: w[..., torch.tensor([1, -1]), :],
    "rows mask": lambda w: w[..., torch.arange(w.shape[-2]) > 1, :],
    "row tensor": lambda w: w[..., torch.tensor(1), :],
    "head": lambda w: w[1],
    "heads slice": lambda w: w[1:],
    "heads list": lambda w: w[[0, -1]],
    "mean of heads": lambda w: w.mean(0),
    "mean of heads kept": lambda w: w.mean(0, keepdim=True),
    "mean of heads by name": lambda w: w.mean(dim=-4),
    "mean of heads by NumPy's names": lambda w: w.mean(axis=0, keepdims=True),
    "mean of heads by NumPy's number": lambda w: w.mean(np.int64(0)),
    "mean of heads and rows": lambda w: w.mean((0, 2)),
    "mean of all": lambda w: w.mean(),
    "largest": lambda w: w.topk(1, -1).values,
    "smallest, unsorted": lambda w: w.topk(1, largest=False, sorted=False).values,
}
ASKED: dict[str, Callable[[LazyWeights], Tensor]] = PARTS | {
    "row": lambda w: w.rows(2),
    "last row": lambda w: w.rows(-1),
    "rows slice": lambda w: w.rows(slice(1, 6, 2)),
    "rows list": lambda w: w.rows([3, 0, 3]),
    "rows tensor": lambda w: w.rows(torch.tensor([1, -1])),
    "rows mask": lambda w: w.rows(torch.arange(w.shape[-2]) > 1),
    "row tensor": lambda w: w.rows(torch.tensor(1)),
    "head": lambda w: w.heads(1),
    "heads slice": lambda w: w.heads(slice(1, None)),
    "heads list": lambda w: w.heads([0, -1]),
}
# Between them every kind of mask and bias, and every dimension that a dense one may lack.
CUT = {
    case.name: case
    for case in CASES
    if case.name
    in (
        "grouped heads",
        "causal more queries than keys",
        "prefix",
        "documents causal",
        "padding with an empty sequence",
        "drop all of a head",
        "either",
        "nested",
        "dense bias 2x4x7x7",
        "dense bias 1x4x7x1",
        "dense bias 2x1x1x7",
        "t5 causal",
        "alibi",
        "softcap",
        "left padding by positions",
    )
}


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("case", CUT.values(), ids=CUT)
def test_a_part_is_that_of_the_whole(
    case: Case, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_module, "BLOCK", 40)
    call, made = made_call(case)
    compute = Counted()
    weights = lazy_weights(call, compute, heads_first=True)
    part = ASKED[name](weights)
    assert not weights.materialized
    whole = call.batch * call.heads * call.target * call.source
    assert compute.largest() < whole
    assert_same(part, PARTS[name](run_weights(call, "reference").transpose(0, 1)), made)


@pytest.mark.parametrize("name", PARTS)
def test_a_part_of_computed_weights_is_taken_from_them(name: str) -> None:
    small = Small()
    weights = small.lazy()
    assert weights.sum() > 0
    part = ASKED[name](weights)
    assert len(small.compute.calls) == 1
    expected = PARTS[name](small.plain())
    torch.testing.assert_close(part, expected)
    torch.testing.assert_close(
        torch.autograd.grad(part.square().sum(), small.leaves),
        torch.autograd.grad(expected.square().sum(), small.leaves),
    )


def test_parts_in_the_other_layouts() -> None:
    small = Small()
    plain = small.plain(heads_first=False)
    weights = small.lazy(heads_first=False)
    torch.testing.assert_close(weights.heads(1), plain[:, 1])
    torch.testing.assert_close(weights.heads([2, 0]), plain[:, [2, 0]])
    torch.testing.assert_close(weights.rows(1), plain[..., 1, :])
    torch.testing.assert_close(weights.rows(-4), plain[..., 0, :])
    torch.testing.assert_close(weights.mean(1), plain.mean(1))
    averaged = small.lazy(result="mean_weights")
    torch.testing.assert_close(averaged.rows(1), plain.mean(1)[:, 1])
    torch.testing.assert_close(averaged.topk(2).indices, plain.mean(1).topk(2).indices)
    assert not weights.materialized
    assert not averaged.materialized
    # Not over the heads: as of any tensor.
    torch.testing.assert_close(weights.mean(0), plain.mean(0))
    torch.testing.assert_close(averaged.mean(0), plain.mean(1).mean(0))
    in_float32 = plain.mean(1, dtype=torch.float32)
    assert torch.equal(small.lazy(heads_first=False).mean(1, dtype=torch.float32), in_float32)
    with pytest.raises(ValueError, match="averaged over the heads"):
        averaged.heads(0)


@pytest.mark.parametrize("heads_first", [True, False])
def test_unbatched(heads_first: bool) -> None:
    small = Small()
    small.query, small.key = (t[:1].detach().requires_grad_() for t in (small.query, small.key))
    for result in ("weights", "mean_weights"):
        expected = run_weights(small.call(result), "reference")[0]
        weights = lazy_weights(
            small.call(result), small.compute, heads_first=heads_first, batched=False
        )
        assert weights.shape == expected.shape
        torch.testing.assert_close(weights.rows([1, 0]), expected[..., [1, 0], :])
        torch.testing.assert_close(weights.mean(0), expected.mean(0))
        torch.testing.assert_close(weights.entropy(), entropy(expected))
        if result == "weights":
            torch.testing.assert_close(weights.heads(1), expected[1])
            assert not weights.materialized
        assert_same(weights + 0, expected, dict(enumerate(small.leaves)))
        assert weights.stride() == expected.contiguous().stride()


def entropy(weights: Tensor) -> Tensor:
    return torch.special.entr(weights).sum(-1)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_entropy(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_module, "BLOCK", 40)
    call, made = made_call(case)
    plain = run_weights(call, "reference").transpose(0, 1)
    weights = lazy_weights(call, Counted(), heads_first=True)
    result = weights.entropy()
    assert not weights.materialized
    torch.testing.assert_close(result, entropy(plain))
    # The gradient of entr is infinite at 0, where the weights' is 0.
    shown = torch.where(plain > 0, plain, 1.0)
    torch.testing.assert_close(
        gradients(result, made), gradients(-(plain * shown.log()).sum(-1), made)
    )


def test_entropy_of_equal_weights_and_of_a_hidden_row() -> None:
    query, key = torch.zeros(1, 1, 2, 4, dtype=torch.bfloat16), torch.zeros(1, 1, 8, 4).bfloat16()
    hidden = masks.drop(torch.tensor([[False], [True]]))
    call = AttentionCall.checked(query, key, key, mask=hidden, result="weights")
    result = lazy_weights(call, Counted()).entropy()
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, torch.tensor([8.0, 1.0]).log().view(1, 1, 2))


def test_topk_has_indices_and_torchs_errors() -> None:
    small = Small()
    values, indices = small.lazy().topk(2)
    assert torch.equal(small.plain().gather(-1, indices), values)
    with pytest.raises(RuntimeError, match="out of range"):
        small.lazy().topk(6)


@pytest.mark.parametrize("dims", [(0, 7), (7, 0), (0, -5)])
def test_a_mean_over_dimensions_that_are_none_is_torchs_error(dims: tuple[int, int]) -> None:
    with pytest.raises(IndexError, match="Dimension out of range"):
        Small().lazy().mean(dims)


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (4, IndexError, r"index must be in \[-4, 4\); got 4"),
        (-5, IndexError, r"got -5"),
        ([9], IndexError, "out of bounds"),
        (torch.zeros(2, 2, dtype=torch.int64), ValueError, r"one dimension; got \(2, 2\)"),
        (torch.tensor([True]), IndexError, r"shape \(4,\); got \(1,\)"),
    ],
)
def test_bad_indices(index: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Small().lazy().rows(index)


@pytest.mark.parametrize("nothing", [[], slice(2, 2), torch.zeros(4, dtype=torch.bool)], ids=str)
def test_nothing_can_be_chosen(nothing: object) -> None:
    weights = Small().lazy()
    rows = weights.rows(nothing)
    assert rows.shape == (*weights.shape[:-2], 0, weights.shape[-1])
    heads = Small().lazy().heads(nothing[:3] if isinstance(nothing, Tensor) else nothing)
    assert heads.shape == (0, *weights.shape[1:])


@dataclasses.dataclass(frozen=True, eq=False)
class EvenHeads(masks.Mask):
    """A user's own: odd heads see the first key only."""

    def visible(self, tile: object) -> Tensor:
        even = (torch.arange(3) % 2 == 0)[tile.heads, None, None]
        return even[None] | (tile.key_position == 0)

    def shape(self, batch: int, heads: int, target: int, source: int) -> tuple[int, ...]:
        return 1, heads, 1, source


def test_a_mask_of_unknown_kind_is_not_cut_but_right() -> None:
    small = Small()
    call = dataclasses.replace(small.call(), mask=EvenHeads() & masks.Causal())
    plain = run_weights(call, "reference")
    weights = lazy_weights(call, small.compute)
    torch.testing.assert_close(weights.heads(1), plain[:, 1])
    assert weights.materialized
    torch.testing.assert_close(weights.rows(1), plain[..., 1, :])
    torch.testing.assert_close(weights.entropy(), entropy(plain))
    assert len(small.compute.calls) == 1
