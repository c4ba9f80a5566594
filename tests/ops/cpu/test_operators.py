"""The native backend compiled, exported, transformed; differentiated twice, which it refuses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests.compile.captured import Captured
from zeta import BackendUnsupported, attention, attention_weights, attention_with_lse, biases, masks
from zeta.ops.attention import run_with_weights
from zeta.ops.backends import cpu
from zeta.ops.backends.cpu import functions, operators
from zeta.ops.call import AttentionCall
from zeta.ops.lowering import lower

Made = dict[str, Tensor]


def make(target: int = 9, source: int = 9, dtype: torch.dtype = torch.float32) -> Made:
    shapes = {
        "query": (2, 4, target, 16), "key": (2, 2, source, 16), "value": (2, 2, source, 24),
        "table": (16, 4), "bias": (1, 4, 1, source),
    }  # fmt: skip
    return {name: torch.randn(s, dtype=dtype, requires_grad=True) for name, s in shapes.items()}


def options(made: Made) -> dict[str, Any]:
    bias = biases.Bucketed(made["table"], max_distance=20) + biases.Dense(made["bias"])
    return {"mask": masks.Causal(), "bias": bias + biases.Softcap(4.0), "backend": "cpu"}


def several(query: Tensor, key: Tensor, value: Tensor, table: Tensor, bias: Tensor) -> list[Tensor]:
    """Everything the backend can be asked for."""
    arguments = options({"table": table, "bias": bias})
    out, lse = attention_with_lse(query, key, value, dropout_p=0.1, seed=3, **arguments)
    weights = attention_weights(query, key, **arguments)
    mean = attention_weights(query, key, reduce="mean", **arguments)
    return [out, lse, weights, mean]


def gradients(found: list[Tensor], made: Made) -> tuple[Tensor, ...]:
    loss = sum(tensor.float().square().sum() for tensor in found)
    assert isinstance(loss, Tensor)
    return torch.autograd.grad(loss, list(made.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_calls_give_the_same(dtype: torch.dtype) -> None:
    made = make(30, 33, dtype)
    compiled = torch.compile(several, fullgraph=True, backend="aot_eager")
    expected, actual = several(*made.values()), compiled(*made.values())
    for got, wanted in zip(actual, expected, strict=True):
        assert torch.equal(got, wanted)
    for got, wanted in zip(gradients(actual, made), gradients(expected, made), strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_graph_holds_what_autograd_has_nothing_to_do_with() -> None:
    captured, made = Captured(), make()
    compiled = torch.compile(several, fullgraph=True, backend=captured.backend)
    gradients(compiled(*made.values()), made)
    passes = ("attention", "attention_backward", "weights", "weights_backward")
    names = {name for name in captured.operators if "zeta" in name}
    assert names == {f"zeta.cpu_{name}_kernel.default" for name in passes}


def test_one_graph_for_all_lengths() -> None:
    compiled = torch.compile(several, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (7, 12, 40):
        made = make(length, length)
        for got, wanted in zip(compiled(*made.values()), several(*made.values()), strict=True):
            assert torch.equal(got, wanted)


def test_exported_calls_give_the_same() -> None:
    class Attend(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> list[Tensor]:
            return several(*tensors)

    made = tuple(tensor.detach() for tensor in make().values())
    program = torch.export.export(Attend(), made).module()
    for got, wanted in zip(program(*made), several(*made), strict=True):
        assert torch.equal(got, wanted)


# By torch 2.14, of what `opcheck` itself does.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_operators_are_declared_as_they_are() -> None:
    made = make()
    query, key, value = made["query"], made["key"], made["value"]
    arguments = options(made)
    del arguments["backend"]
    call = AttentionCall.checked(query, key, value, dropout_p=0.1, seed=3, **arguments)
    lowered = lower(call)
    assert lowered.offsets is not None
    offsets = lowered.offsets.detach().requires_grad_()
    operands = (query, key, value, offsets, lowered.dense)
    torch.library.opcheck(operators.attention.overload, (*operands, *lowered.fixed(), False))
    for mean in (False, True):
        given = (query, key, offsets, lowered.dense, mean, *lowered.fixed(), False)
        torch.library.opcheck(operators.weights.overload, given)


def _loss(query: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    key = torch.linspace(-1, 1, 80, dtype=dtype).view(1, 1, 5, 16)
    return attention(query, key, key, mask=masks.Causal(), backend="cpu").square().sum()


def test_functional_gradients() -> None:
    query = torch.randn(1, 1, 5, 16, requires_grad=True)
    (expected,) = torch.autograd.grad(_loss(query), query)
    torch.testing.assert_close(torch.func.grad(_loss)(query), expected)


# torch.func.jvp uses it itself.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_transforms_that_cannot_pass_are_refused() -> None:
    query = torch.randn(3, 1, 1, 5, 16)
    with pytest.raises(BackendUnsupported, match=r"torch\.func\.vmap cannot map over it"):
        torch.func.vmap(_loss)(query)
    with pytest.raises(BackendUnsupported, match="no forward-mode derivative"):
        torch.func.jvp(_loss, (query[0],), (query[0],))


def test_mapping_over_something_else_is_none_of_its_business() -> None:
    query = torch.randn(1, 1, 5, 16)
    mapped = torch.func.vmap(lambda scale: _loss(query) * scale)(torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(mapped[1], _loss(query) * 2)


def _weigh(query: Tensor) -> Tensor:
    return attention_weights(query, query, backend="cpu").square().sum()


def _placed(query: Tensor, first: Tensor, backend: str = "cpu") -> Tensor:
    positions = {
        "query_positions": first + torch.arange(9),
        "key_positions": first + torch.arange(9),
    }
    made = query.detach().flip(2)
    return attention(query, made, made, mask=masks.Causal(), backend=backend, **positions)


def _compiled_loss(backend: str) -> Callable[[Tensor, Tensor], Tensor]:
    def found(query: Tensor, first: Tensor) -> Tensor:
        out = torch.compile(_placed, fullgraph=True, backend=backend)(query, first)
        return torch.autograd.grad(out.square().sum(), query)[0]

    return found


WAYS = {
    "eager": _compiled_loss("eager"),
    "aot_eager": _compiled_loss("aot_eager"),
    "torch.func.grad": torch.func.grad(lambda *made: _placed(*made).square().sum()),
}


@pytest.mark.parametrize("way", WAYS)
def test_far_positions_that_nobody_saw_before_are_an_error(way: str) -> None:
    query = torch.randn(2, 4, 9, 16, requires_grad=True)
    for first in (0, 3, -(2**30) + 1, 2**30 - 9):
        (expected,) = torch.autograd.grad(
            _placed(query, torch.tensor(first), "reference").square().sum(), query
        )
        found = WAYS[way](query, torch.tensor(first))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for first in (-(2**30), 2**30 - 8, 2**32, 2**33 + 5, -(2**63)):
        with pytest.raises(RuntimeError, match=r"positions from .*'chunked' or 'reference'"):
            WAYS[way](query, torch.tensor(first))
        _placed(query, torch.tensor(first), "auto")  # Seen, and left to another backend.


@pytest.mark.parametrize("function", [_loss, _weigh])
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_second_derivatives_are_refused_with_a_way_out(function: Any, backend: str | None) -> None:
    query = torch.randn(1, 1, 5, 16, requires_grad=True)
    if backend is not None:
        function = torch.compile(function, fullgraph=True, backend=backend)
    (grad,) = torch.autograd.grad(function(query), query, create_graph=True)
    message = r"'cpu' differentiates once; .* backend='reference'"
    if backend is not None:
        message = "torch.compile with aot_autograd does not currently support double backward"
    with pytest.raises(RuntimeError, match=message):
        grad.sum().backward()


def test_a_second_derivative_inside_a_transform_is_refused() -> None:
    query = torch.randn(1, 1, 5, 16)
    with pytest.raises(RuntimeError, match=r"'cpu' differentiates once; .* backend='reference'"):
        torch.func.grad(lambda x: torch.func.grad(_loss)(x).square().sum())(query)


def test_results_that_are_not_used_cost_no_gradient() -> None:
    made = make()
    out, lse = attention_with_lse(made["query"], made["key"], made["value"], backend="cpu")
    of_query, of_value = torch.autograd.grad(
        lse.sum(), (made["query"], made["value"]), materialize_grads=True, retain_graph=True
    )
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in made.items()}
    _, wanted = attention_with_lse(wide["query"], wide["key"], wide["value"], backend="reference")
    (expected,) = torch.autograd.grad(wanted.sum(), wide["query"])
    torch.testing.assert_close(of_query.double(), expected, rtol=1e-5, atol=1e-5)
    assert not of_value.any()
    # Nothing that was asked for depends on the bias.
    assert torch.autograd.grad(out.sum(), made["table"], allow_unused=True) == (None,)


def test_a_checkpoint_gives_back_what_it_saved_once() -> None:
    made = make()
    operands = made["query"], made["key"], made["value"]

    def both(*operands: Tensor) -> tuple[Tensor, Tensor]:
        return attention_with_lse(*operands, backend="cpu")

    for place in (0, 1):
        again = checkpoint(both, *operands, use_reentrant=False)[place]
        found, wanted = (
            torch.autograd.grad(part.square().sum(), operands[:2])
            for part in (again, both(*operands)[place])
        )
        assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("mean", [False, True])
def test_output_and_weights_of_one_call_have_their_gradients(mean: bool) -> None:
    made = make()
    operands = made["query"], made["key"], made["value"]
    arguments = options(made)
    described = {name: arguments[name] for name in ("mask", "bias")}
    found = run_with_weights(AttentionCall.checked(*operands, **described), mean=mean)
    weights = attention_weights(*operands[:2], reduce="mean" if mean else None, **arguments)
    expected = [attention(*operands, **arguments), weights]
    torch.testing.assert_close(list(found), expected)
    torch.testing.assert_close(gradients(list(found), made), gradients(expected, made))


class _NoGradient(torch.autograd.Function):
    """Of which nothing arrives at what it was computed from."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.clone() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        return (None,) * len(gradients)


@pytest.mark.parametrize("compiled", [False, True])
def test_where_no_gradient_arrives_none_leaves(compiled: bool) -> None:
    made = make()
    run = torch.compile(several, fullgraph=True, backend="aot_eager") if compiled else several
    found = _NoGradient.apply(*run(*made.values()))
    loss = sum(tensor.sum() for tensor in found)
    assert isinstance(loss, Tensor)
    given = torch.autograd.grad(loss, list(made.values()), allow_unused=True)
    assert not any(gradient is not None and gradient.any() for gradient in given)


def _spread(saved: Tensor) -> Tensor:
    return saved.mT.contiguous().mT if saved.dim() > 1 else saved


def _negated(saved: Tensor) -> Tensor:
    return torch._neg_view(-saved) if saved.is_floating_point() else saved


@pytest.mark.parametrize("change", [_spread, _negated])
def test_what_was_saved_may_come_back_otherwise(change: Callable[[Tensor], Tensor]) -> None:
    # So many keys that the log-sum-exp is not found anew.
    made = make(60, 600)
    wanted = gradients(several(*made.values()), made)
    with torch.autograd.graph.saved_tensors_hooks(change, lambda saved: saved):
        found = several(*made.values())
    for one, other in zip(gradients(found, made), wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_eager_calls_run_no_operator() -> None:
    made = make()
    out = attention(made["query"], made["key"], made["value"], backend="cpu")
    assert isinstance(out.grad_fn, functions.Attention._backward_cls)  # type: ignore[attr-defined]


def test_autocast_leaves_the_inside_alone() -> None:
    made = make(dtype=torch.bfloat16)
    operands = (made["query"], made["key"], made["value"])
    expected, expected_lse = cpu.run(AttentionCall.checked(*operands))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = cpu.run(AttentionCall.checked(*operands))
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_inference_mode_and_views(requires_grad: bool) -> None:
    joined = torch.randn(2, 9, 3, 4, 16, requires_grad=requires_grad)
    query, key, value = joined.permute(2, 0, 3, 1, 4).unbind()
    expected = attention(query, key, value, backend="reference")
    torch.testing.assert_close(attention(query, key, value, backend="cpu"), expected)
    with torch.inference_mode():
        torch.testing.assert_close(attention(query, key, value, backend="cpu"), expected)


class _Watcher(TorchDispatchMode):
    """Writes down what torch is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("mask", [None, masks.SlidingWindow(3)], ids=str)
def test_a_mode_sees_the_operator(mask: masks.Mask | None, requires_grad: bool) -> None:
    query = torch.randn(1, 2, 5, 16, requires_grad=requires_grad)
    with _Watcher() as watcher:
        found = attention(query, query, query, mask=mask, backend="cpu")
    assert any(name.startswith("zeta::") for name in watcher.names), watcher.names
    torch.testing.assert_close(found, attention(query, query, query, mask=mask, backend="cpu"))


def _apart(*shape: int) -> Tensor:
    """Its features two numbers apart."""
    return torch.randn(*shape, 2)[..., 0]


LAYOUTS: dict[str, Callable[..., Tensor]] = {  # of B, heads, length, features
    "one after the other": torch.randn,
    "heads inside": lambda b, h, n, d: torch.randn(b, n, h, d).transpose(1, 2),
    "of a longer one": lambda b, h, n, d: torch.randn(b, h, 2 * n, d)[:, :, :n],
    "features apart": _apart,
    "heads inside, features apart": lambda b, h, n, d: _apart(b, n, h, d).transpose(1, 2),
    "length inside": lambda b, h, n, d: torch.randn(b, h, d, n).mT,
    "batch inside": lambda b, h, n, d: torch.randn(h, n, d, b).permute(3, 0, 1, 2),
    "repeated": lambda b, h, n, d: torch.randn(1, 1, n, 1).expand(b, h, n, d),
}


def _of_all_operators(made: list[Tensor], kernel: str) -> list[Tensor]:
    """What each makes; ``kernel`` ends the names of those that have two."""
    query, key, value, offsets, dense = made
    fixed = ([], 0.25, False, 0, 0.0, False, 0.0, False)
    call = {
        name: getattr(torch.ops.zeta, f"cpu_{name}") for name in ("weights", "weights_backward")
    }
    for name in ("attention", "attention_backward"):
        call[name] = getattr(torch.ops.zeta, f"cpu_{name}_{kernel}")
    out, lse = call["attention"](query, key, value, offsets, dense, *fixed)
    saved = (query, key, value, out, lse, offsets, dense)
    found = [out, lse, *call["attention_backward"](out, lse, *saved, *fixed, True, True)]
    found += call["attention_backward"](out, None, *saved, *fixed, True, False)
    for mean in (False, True):
        weights, lse = call["weights"](query, key, offsets, dense, mean, *fixed)
        given = (weights, query, key, lse, offsets, dense)
        found += [weights, lse, *call["weights_backward"](*given, *fixed, True, True)]
    return found


def _steps(tensor: Tensor) -> list[int]:
    """Its strides, but for those of single numbers, which lead nowhere."""
    return [step for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


@pytest.mark.parametrize("target", [1, 9])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_lie_as_compilers_are_told(layout: str, target: int) -> None:
    lay = LAYOUTS[layout]
    made = [
        lay(2, 4, target, 16), lay(2, 2, 9, 16), lay(2, 2, 9, 24), torch.randn(4, 23),
        torch.randn(1, 9, 9, 4).permute(0, 3, 1, 2)[:, :, :target],
    ]  # fmt: skip
    with FakeTensorMode() as mode:
        told = _of_all_operators([mode.from_tensor(tensor) for tensor in made], "kernel")
    for kernel in ("kernel", "python"):
        for real, fake in zip(_of_all_operators(made, kernel), told, strict=True):
            assert (real.shape, real.dtype) == (fake.shape, fake.dtype)
            assert _steps(real) == _steps(fake)


@pytest.mark.slow
# Inductor still defines methods of `torch.jit`.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
def test_inductor_takes_features_that_lie_apart() -> None:
    made = [LAYOUTS["heads inside, features apart"](2, 4, 9, 16) for _ in range(3)]
    leaves = [tensor.requires_grad_() for tensor in made]

    def both(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        weights = attention_weights(query, key, backend="cpu")
        return [attention(query, key, value, backend="cpu"), weights]

    compiled = torch.compile(both, fullgraph=True)(*leaves)
    named = dict(zip(("query", "key", "value"), leaves, strict=True))
    for got, wanted in zip(
        gradients(compiled, named), gradients(both(*leaves), named), strict=True
    ):
        torch.testing.assert_close(got, wanted)
