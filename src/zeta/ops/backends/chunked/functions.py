"""The passes as ``torch.autograd`` functions, for eager mode: cheaper to call than operators, and
they compose with ``torch.func.grad``.

Shape suffixes: B batch, H query heads, T target length, S source length, D features.
"""

from functools import partial
from typing import Any

from torch import Tensor

from zeta.ops.backends.chunked import passes
from zeta.ops.backends.chunked.backward import Incoming
from zeta.ops.backends.chunked.description import Plan
from zeta.ops.functions import Once, differentiated_once
from zeta.transforms import of_each_gradient


def _remember(ctx: Any, plan: Plan, pairs: Tensor, inputs: tuple[Tensor, ...]) -> None:
    """Everything for `_find`; the plan's tensors too, for torch to see whether one is changed."""
    tensors = plan.tensors()
    ctx.plan, ctx.num_fixed = plan, len(tensors)
    ctx.mark_non_differentiable(pairs)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, pairs, *inputs)


def _find(ctx: Any, incoming: dict[str, Tensor | None], num_operands: int) -> list[Tensor | None]:
    """Gradients of query, key, value and each bias tensor; None where there is none."""
    tensors = ctx.saved_tensors
    plan = ctx.plan.with_tensors(tensors[: ctx.num_fixed])
    pairs, *saved = tensors[ctx.num_fixed :]
    arrived = {name: grad for name, grad in incoming.items() if grad is not None}
    operands, biases = saved[:num_operands], saved[num_operands:]
    if num_operands == 2:
        operands.append(operands[1])  # Weights have no value; nothing is made of it.
    needs_grad = tuple(ctx.needs_input_grad[-len(biases) :]) if biases else ()

    def compute(pairs: Tensor, *tensors: Any) -> tuple[Tensor | None, ...]:
        incoming = Incoming(**dict(zip(arrived, tensors, strict=False)))
        query, key, value, *biases = tensors[len(arrived) :]
        *found, of_biases = passes.gradients(
            plan, incoming, pairs, query, key, value, biases, needs_grad
        )
        return *found, *of_biases

    once = partial(differentiated_once, "chunked", compute)
    found = of_each_gradient(once, pairs, *arrived.values(), *operands, *biases)
    rest = iter(found[3:])
    return [*found[:3], *(next(rest) if needed else None for needed in needs_grad)]


class Attention(Once):
    """Output, log-sum-exp and pairs; see `passes.attention`."""

    backend = "chunked"

    @staticmethod
    def forward(
        plan: Plan, query: Tensor, key: Tensor, value: Tensor, *biases: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return passes.attention(plan, query, key, value, biases)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _remember(ctx, inputs[0], output[2], inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if grads[0] is None and grads[1] is None:
            return (None,) * len(ctx.needs_input_grad)
        return None, *_find(ctx, {"out": grads[0], "lse": grads[1]}, num_operands=3)


class Weights(Once):
    """Weights and pairs; see `passes.weights`."""

    backend = "chunked"

    @staticmethod
    def forward(
        plan: Plan, mean: bool, query: Tensor, key: Tensor, *biases: Tensor
    ) -> tuple[Tensor, Tensor]:
        return passes.weights(plan, query, key, biases, mean)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _remember(ctx, inputs[0], output[1], inputs[2:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if grads[0] is None:
            return (None,) * len(ctx.needs_input_grad)
        grad_query, grad_key, _, *of_biases = _find(ctx, {"weights": grads[0]}, num_operands=2)
        return None, None, grad_query, grad_key, *of_biases
