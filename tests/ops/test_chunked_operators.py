"""The chunked backend as operators and autograd functions: compiled, transformed, refused."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.blockwise import Results, assert_same, gradients, make
from zeta import biases, masks
from zeta.ops.backends import chunked, reference
from zeta.ops.backends.chunked import functions, operators
from zeta.ops.backends.chunked.description import Plan
from zeta.ops.call import AttentionCall


def _packed(**arguments: object) -> tuple[Results, Plan, list[Tensor]]:
    made = make(9, 9)
    call = AttentionCall.checked(made["query"], made["key"], made["value"], **arguments)
    plan, tensors = Plan.of(call)
    return made, plan, [tensor.detach().requires_grad_() for tensor in tensors]


# By torch 2.14, of what `opcheck` itself does.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("explicit", [False, True])
def test_operators_are_declared_as_they_are(explicit: bool) -> None:
    table = torch.randn(12, 4, dtype=torch.float64, requires_grad=True)
    positions = (
        {"query_positions": torch.arange(9), "key_positions": torch.arange(9)} if explicit else {}
    )
    made, plan, tensors = _packed(
        mask=masks.Causal() & masks.Padding(torch.tensor([9, 4])),
        bias=biases.Bucketed(table, max_distance=20)
        + biases.Softcap(5.0)
        + biases.Dense(torch.randn(9, 9)),
        dropout_p=0.1,
        seed=3,
        **positions,
    )
    others, spec = plan.pack()
    query, key, value = made["query"], made["key"], made["value"]
    torch.library.opcheck(
        operators.attention, (query, key, value, tensors, others, spec, plan.scale, 0.1)
    )
    for mean in (False, True):
        torch.library.opcheck(
            operators.weights, (query, key, tensors, others, spec, plan.scale, mean)
        )


def test_a_plan_survives_packing() -> None:
    _, plan, _ = _packed(
        mask=masks.SlidingWindow(3) | masks.Documents(torch.zeros(2, 9, dtype=torch.int64)),
        bias=biases.Softcap(2.5) + biases.Alibi(torch.rand(4)),
        dropout_p=0.25,
        seed=3,
        key_positions=torch.arange(9),
    )
    others, spec = plan.pack()
    again = Plan.unpack(others, spec, plan.scale, plan.dropout_p)
    assert again.words == plan.words
    assert again.seed is plan.seed
    assert again.query_positions is None
    assert again.key_positions is plan.key_positions
    assert again.mask is not None
    assert plan.mask is not None
    assert torch.equal(again.mask.dense(2, 4, 9, 9), plan.mask.dense(2, 4, 9, 9))


def test_compiled_calls_give_the_same() -> None:
    made = make(30, 33)

    def run(
        query: Tensor, key: Tensor, value: Tensor, table: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        arguments = {
            "mask": masks.Causal(),
            "bias": biases.Bucketed(table, max_distance=20) + biases.Softcap(4.0),
        }
        out, lse = chunked.run(AttentionCall.checked(query, key, value, **arguments))
        mean = chunked.weights(
            AttentionCall.checked(query, key, value, result="mean_weights", **arguments)
        )
        return out, lse, mean

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected, actual = run(*made.values()), compiled(*made.values())
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, wanted)
    grads = gradients(list(actual), made)
    assert_same(grads, gradients(list(expected), made))


def test_autocast_leaves_the_inside_alone() -> None:
    made = make(dtype=torch.bfloat16)
    operands = made["query"], made["key"], made["value"]
    leaves = {name: made[name] for name in ("query", "key", "value")}

    def results() -> Results:
        out, lse = chunked.run(AttentionCall.checked(*operands))
        weights = chunked.weights(AttentionCall.checked(*operands, result="weights"))
        found = {"out": out, "lse": lse, "weights": weights}
        return found | gradients(list(found.values()), leaves)

    expected = results()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(results(), expected, 0.0)


def _loss(query: Tensor) -> Tensor:
    key = torch.linspace(-1, 1, 40, dtype=torch.float64).view(1, 1, 5, 8)
    out, _ = chunked.run(AttentionCall.checked(query, key, key, mask=masks.Causal()))
    return out.square().sum()


def test_functional_gradients() -> None:
    query = torch.randn(1, 1, 5, 8, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(_loss(query), query)
    torch.testing.assert_close(torch.func.grad(_loss)(query), expected)


def test_vmap_is_refused_with_a_way_out() -> None:
    with pytest.raises(NotImplementedError, match=r"no torch\.func\.vmap; .* backend='reference'"):
        torch.func.vmap(_loss)(torch.randn(3, 1, 1, 5, 8, dtype=torch.float64))


def test_second_derivatives_are_refused_with_a_way_out() -> None:
    query = torch.randn(1, 1, 5, 8, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(_loss(query), query, create_graph=True)
    with pytest.raises(
        RuntimeError, match=r"'chunked' differentiates once; .* backend='reference'"
    ):
        grad.sum().backward()


def test_results_that_are_not_used_cost_no_gradient() -> None:
    made = make(5, 5)
    call = AttentionCall.checked(made["query"], made["key"], made["value"], result="lse")
    _, lse = chunked.run(call)
    grad_query, grad_value = torch.autograd.grad(
        lse.sum(), (made["query"], made["value"]), materialize_grads=True
    )
    _, wanted = reference.run(call)
    torch.testing.assert_close(grad_query, torch.autograd.grad(wanted.sum(), made["query"])[0])
    assert not grad_value.any()


def _placed() -> tuple[Results, dict[str, Any], dict[str, Tensor]]:
    """A call that holds every kind of tensor without a gradient, and those."""
    held = {
        "lengths": torch.tensor([5, 7]),
        "bits": torch.rand(1, 4, 9, 9) < 0.5,
        "query positions": torch.arange(9),
        "key positions": torch.arange(9),
        "seed": torch.tensor(3),
    }
    arguments = {
        "mask": masks.Padding(held["lengths"]) | masks.keep(held["bits"]),
        "query_positions": held["query positions"],
        "key_positions": held["key positions"],
        "dropout_p": 0.5,
        "seed": held["seed"],
    }
    return make(9, 9), arguments, held


HELD = ("lengths", "bits", "query positions", "key positions", "seed")
WRITTEN = [
    *((name, result) for name in HELD for result in ("output", "lse")),
    *((name, result) for name in HELD[:-1] for result in ("weights", "mean_weights")),
]


@pytest.mark.parametrize(("name", "result"), WRITTEN)
def test_what_is_written_to_before_the_backward_pass_is_noticed(name: str, result: str) -> None:
    made, arguments, held = _placed()
    call = AttentionCall.checked(
        made["query"], made["key"], made["value"], result=result, **arguments
    )
    found = chunked.weights(call) if "weights" in result else chunked.run(call)[result == "lse"]
    held[name].zero_()
    loss = found.nan_to_num(neginf=0.0).square().sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_was_saved_elsewhere_is_what_the_gradient_is_of() -> None:
    made, arguments, held = _placed()
    call = AttentionCall.checked(made["query"], made["key"], made["value"], **arguments)
    expected = gradients([chunked.run(call)[0]], {"query": made["query"]})
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved):
        out, _ = chunked.run(call)
    for tensor in held.values():
        tensor.zero_()
    assert_same(gradients([out], {"query": made["query"]}), expected, 0.0)


def test_an_unknown_bias_is_refused_by_name() -> None:
    class Doubled(biases.Bias):
        pass

    made = make(5, 5)
    call = AttentionCall.checked(made["query"], made["key"], made["value"], bias=Doubled())
    assert chunked.unsupported(call) == ["it cannot apply the bias Doubled"]


def test_eager_calls_do_not_pack() -> None:
    made = make(5, 5)
    out, _ = chunked.run(AttentionCall.checked(made["query"], made["key"], made["value"]))
    assert isinstance(out.grad_fn, functions.Attention._backward_cls)  # type: ignore[attr-defined]
