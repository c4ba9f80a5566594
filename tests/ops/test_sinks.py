"""Sinks: every backend against the textbook, in which a sink is one more column of the softmax."""

import math

import pytest
import torch
from torch import Tensor

import zeta
from tests.ops.bound import assert_within_bound
from tests.ops.cases import Case, Made, widened
from zeta import biases, masks
from zeta.ops.call import AttentionCall
from zeta.ops.dropout import keep_mask

# Long enough that the far buckets' gradient is made from the sums of rows.
T5 = {"batch": 1, "heads": 2, "key_heads": 2, "target": 45, "source": 45}
TABLE = {"table": (8, 2), "sinks": (2,)}
CASES = [
    Case("plain", learned={"sinks": (4,)}),
    Case("grouped heads", key_heads=2, target=5, source=9, learned={"sinks": (4,)}),
    Case("causal", mask=masks.Causal, target=40, source=40, learned={"sinks": (4,)}),
    Case("empty rows", mask=lambda: masks.Padding(torch.tensor([5, 0])), learned={"sinks": (4,)}),
    Case(
        "window",
        mask=lambda: masks.SlidingWindow(3),
        target=6,
        source=9,
        learned={"sinks": (4,)},
    ),
    Case("dropout", dropout_p=0.4, learned={"sinks": (4,)}),
    Case("softcap", bias=lambda made: biases.Softcap(2.0), learned={"sinks": (4,)}),
    Case(
        "dense bias",
        learned={"bias": (1, 4, 7, 7), "sinks": (4,)},
        bias=lambda made: biases.Dense(made["bias"]),
    ),
    Case(
        "T5",
        learned=TABLE,
        bias=lambda made: biases.Bucketed(made["table"], max_distance=9),
        **T5,
    ),
    Case(
        "T5 causal",
        learned=TABLE,
        bias=lambda made: biases.Bucketed(made["table"], bidirectional=False, max_distance=9),
        mask=lambda: masks.Causal() & masks.Padding(torch.tensor([39])),
        **T5,
    ),
]


def arguments(case: Case, made: Made) -> dict[str, object]:
    return case.arguments(made) | {"sinks": made["sinks"]}


def weighting(tensor: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(tensor.numel())
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float64)


def gradients(loss: Tensor, made: Made) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(made.values()), allow_unused=True)
    pairs = zip(made.items(), found, strict=True)
    return {f"grad {name}": grad for (name, _), grad in pairs if grad is not None}


def summed(out: Tensor, lse: Tensor, made: Made) -> dict[str, Tensor]:
    loss = (out.double() * weighting(out)).sum() + (lse * weighting(lse)).sum()
    return {"out": out, "lse": lse} | gradients(loss, made)


def run(case: Case, made: Made, backend: str) -> dict[str, Tensor]:
    out, lse = zeta.attention_with_lse(
        made["query"], made["key"], made["value"], backend=backend, **arguments(case, made)
    )
    return summed(out, lse, made)


def textbook_softmax(case: Case, made: Made) -> tuple[AttentionCall, Tensor, Tensor]:
    """Weights and logarithm of the denominator, the sink being a last column that is cut off."""
    given = case.arguments(made)
    call = AttentionCall.checked(made["query"], made["key"], made["value"], **given)
    group = case.heads // case.key_heads
    scores = made["query"] @ made["key"].repeat_interleave(group, 1).mT / math.sqrt(case.head_dim)
    if call.bias is not None:
        scores = call.bias.apply(scores, call.tile())
    visible = call.visible(call.tile())
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    column = made["sinks"].to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
    joined = torch.cat((scores, column), -1)
    return call, joined.softmax(-1)[..., :-1], joined.logsumexp(-1)


def textbook(case: Case, made: Made) -> dict[str, Tensor]:
    call, weights, lse = textbook_softmax(case, made)
    if case.dropout_p:
        weights = weights * keep_mask(call, call.tile()) / (1 - case.dropout_p)
    value = made["value"].repeat_interleave(case.heads // case.key_heads, 1)
    return summed(weights @ value, lse, made)


# What numpy says to Triton's interpreter.
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    "backend",
    [
        "reference",
        "chunked",
        "cpu",
        pytest.param(
            "triton",
            marks=pytest.mark.skipif(
                torch.cuda.is_available(), reason="beside a GPU nothing is interpreted"
            ),
        ),
    ],
)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_backend_equals_the_textbook(case: Case, backend: str) -> None:
    made = case.tensors(torch.float32)
    oracle = textbook(case, widened(made))
    # The gradient of a sink is one sum over all rows, of terms that are larger than it and cancel.
    rounding = 4 * torch.finfo(torch.float32).eps
    assert_within_bound(run(case, made, backend), textbook(case, made), oracle, rounding)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_sdpa_keeps_its_log_sum_exp_and_refuses(case: Case) -> None:
    with pytest.raises(zeta.BackendUnsupported, match="backend 'sdpa' cannot do"):
        run(case, case.tensors(torch.float32), "sdpa")


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_in_float64_they_equal_it_to_rounding(case: Case, backend: str) -> None:
    made = case.tensors(torch.float64)
    oracle = textbook(case, made)
    assert_within_bound(run(case, made, backend), oracle, oracle)


@pytest.mark.parametrize("reduce", [None, "mean"])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_weights_are_what_the_sink_leaves(case: Case, backend: str, reduce: str | None) -> None:
    made = case.tensors(torch.float64)
    del made["value"]
    given = arguments(case, made)
    del given["dropout_p"], given["seed"]
    found = zeta.attention_weights(
        made["query"], made["key"], reduce=reduce, backend=backend, **given
    )
    expected = textbook_softmax(case, made | {"value": made["key"]})[1]
    expected = expected if reduce is None else expected.mean(1)
    results = [
        {"weights": w} | gradients((w * weighting(w)).sum(), made) for w in (found, expected)
    ]
    assert_within_bound(results[0], results[1], results[1])


def test_half_precision_rounds_once_more_at_most() -> None:
    case = CASES[2]
    made = case.tensors(torch.bfloat16)
    rough = {name: leaf.detach().float().requires_grad_() for name, leaf in made.items()}
    low = {
        name: result.bfloat16() if name != "lse" else result
        for name, result in textbook(case, rough).items()
    }
    assert_within_bound(run(case, made, "chunked"), low, textbook(case, widened(made)))


def test_a_row_without_keys_stays_zero_with_zero_gradients() -> None:
    q, k, v = (torch.randn(1, 2, 3, 4, requires_grad=True) for _ in range(3))
    sinks = torch.tensor([0.5, float("-inf")], requires_grad=True)
    hidden = masks.Padding(torch.tensor([0]))
    out, lse = zeta.attention_with_lse(q, k, v, mask=hidden, sinks=sinks)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse[0, 0], torch.full((3,), 0.5))
    assert torch.equal(lse[0, 1], torch.full((3,), float("-inf")))
    out.sum().backward()
    for leaf in (q, k, v, sinks):
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_a_sink_of_minus_infinity_takes_nothing() -> None:
    q, k, v = torch.randn(3, 2, 4, 5, 8, dtype=torch.float64).unbind()
    none = torch.full((4,), float("-inf"))
    expected = zeta.attention_with_lse(q, k, v)
    for found, wanted in zip(zeta.attention_with_lse(q, k, v, sinks=none), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_it_takes_nothing_from_scores_that_are_the_least_there_are() -> None:
    query, key, value = (torch.randn(1, 2, 3, 4, requires_grad=True) for _ in range(3))
    rows = torch.tensor([[0.0], [torch.finfo(torch.float32).min], [float("-inf")]])
    bias = biases.Dense(rows)
    sinks = torch.full((2,), float("-inf"), requires_grad=True)
    results = []
    for more in ({}, {"sinks": sinks}):
        out, lse = zeta.attention_with_lse(query, key, value, bias=bias, **more)
        loss = (out * weighting(out)).sum() + lse[:, :, :2].sum()
        grads = torch.autograd.grad(loss, (query, key, value, *more.values()))
        weights = zeta.attention_weights(query, key, bias=bias, **more)
        results.append((out, lse, weights, *grads[:3]))
    torch.testing.assert_close(results[1], results[0])
    assert not grads[3].any()


def test_results_over_disjoint_keys_merge_with_the_sinks_given_once() -> None:
    q, k, v = torch.randn(3, 2, 4, 9, 8, dtype=torch.float64).unbind()
    sinks = torch.randn(4, dtype=torch.float64)
    out_1, lse_1 = zeta.attention_with_lse(q, k[:, :, :4], v[:, :, :4], sinks=sinks)
    out_2, lse_2 = zeta.attention_with_lse(q, k[:, :, 4:], v[:, :, 4:])
    lse = torch.logaddexp(lse_1, lse_2)
    merged = sum(
        o * (part - lse).exp().unsqueeze(-1) for o, part in ((out_1, lse_1), (out_2, lse_2))
    )
    whole, expected = zeta.attention_with_lse(q, k, v, sinks=sinks)
    torch.testing.assert_close(merged, whole)
    torch.testing.assert_close(lse, expected)


def test_explain_names_the_sinks_and_why_sdpa_is_out() -> None:
    q = torch.randn(1, 2, 3, 4)
    explanation = zeta.explain(q, q, q, sinks=torch.zeros(2))
    assert "sinks" in explanation.call
    assert "it does not return lse" in explanation.reasons["sdpa"]
    plain = zeta.explain(q, q, q)
    assert plain.reasons["sdpa"] == ()
    assert "sinks" not in plain.call


@pytest.mark.parametrize(
    ("sinks", "error", "words"),
    [
        (torch.zeros(3), ValueError, r"sinks must have shape \(2,\), a score for each head; got"),
        (torch.zeros(1, 2), ValueError, r"got \(1, 2\)"),
        (torch.zeros(2, dtype=torch.int64), TypeError, "floating-point tensor; got a torch.int64"),
        (1.0, TypeError, "floating-point tensor; got float"),
        (torch.zeros(2, device="meta"), ValueError, "sinks must be on the query's device cpu"),
    ],
)
def test_wrong_sinks_are_refused(sinks: object, error: type[Exception], words: str) -> None:
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(error, match=words):
        zeta.attention(q, q, q, sinks=sinks)


def test_lazy_weights_follow_the_sinks() -> None:
    from zeta.ops.attention import run_weights
    from zeta.ops.weights import lazy_weights

    q, k = (torch.randn(2, 4, 6, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    expected = zeta.attention_weights(q, k, sinks=sinks)
    call = AttentionCall.checked(q, k, k, sinks=sinks, result="weights")

    def lazy() -> Tensor:
        return lazy_weights(call, run_weights)

    torch.testing.assert_close(lazy().heads([2, 0]), expected[:, [2, 0]])
    torch.testing.assert_close(lazy().rows(-1), expected[:, :, -1])
    torch.testing.assert_close(lazy().mean(1), expected.mean(1))
    (found,) = torch.autograd.grad((lazy() * weighting(expected)).sum(), [sinks])
    (wanted,) = torch.autograd.grad((expected * weighting(expected)).sum(), [sinks])
    torch.testing.assert_close(found, wanted)
    # An optimizer's step after the call: the weights are still those of the call.
    later = lazy()
    with torch.no_grad():
        sinks.add_(1.0)
        torch.testing.assert_close(later.detach(), expected.detach())


@pytest.mark.parametrize("which", ["query", "key", "lengths", "sinks"])
def test_averaged_weights_of_what_was_written_to_have_no_gradient(which: str) -> None:
    query, key = (torch.randn(2, 4, 6, 8, requires_grad=True) * 1 for _ in range(2))
    tensors = {"query": query, "key": key, "lengths": torch.tensor([3, 5]), "sinks": torch.ones(4)}
    weights = zeta.attention_weights(
        query, key, mask=masks.Padding(tensors["lengths"]), sinks=tensors["sinks"], reduce="mean"
    )
    with torch.no_grad():
        tensors[which].mul_(2)
    with pytest.raises(RuntimeError, match=r"changed in place since|modified by an inplace"):
        weights.square().sum().backward()


def test_in_a_compiled_function_and_under_func_grad() -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 4).unbind()
    sinks = torch.randn(2)

    def loss(sinks: Tensor) -> Tensor:
        return zeta.attention(q, k, v, mask=masks.Causal(), sinks=sinks).square().sum()

    leaf = sinks.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), [leaf])
    torch.testing.assert_close(torch.func.grad(loss)(sinks), expected)
    again = sinks.clone().requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(again), [again])[0], expected)


def test_the_textbook_of_these_tests_can_fail() -> None:
    case = CASES[0]
    made = case.tensors(torch.float64)
    right = textbook(case, made)
    moved = case.tensors(torch.float64)
    with torch.no_grad():
        moved["sinks"] += 1e-6
    with pytest.raises(AssertionError, match="out: rms error"):
        assert_within_bound(textbook(case, moved), right, right)
