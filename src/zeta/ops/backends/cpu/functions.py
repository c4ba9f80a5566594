"""The passes as ``torch.autograd`` functions: for eager code, to which an operator's third of a
millisecond would be most of a small call, and for ``torch.func.grad``.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from zeta.ops.backends.cpu import passes
from zeta.ops.backends.cpu.description import Fixed
from zeta.ops.functions import Once, differentiated_once
from zeta.transforms import of_each_gradient


class Attention(Once):
    """Output and log-sum-exp; see `passes.forward`."""

    backend = "cpu"

    @staticmethod
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        offsets: Tensor | None,
        dense: Tensor | None,
        fixed: Fixed,
    ) -> tuple[Tensor, Tensor]:
        return passes.forward(query, key, value, offsets, dense, fixed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        query, key, value, offsets, dense, fixed = inputs
        ctx.save_for_backward(query, key, value, *output, offsets, dense, *fixed.tensors)
        ctx.fixed = fixed._replace(tensors=())
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
        if grad_out is None and grad_lse is None:
            return (None,) * 6
        # Once: whoever recomputes what was saved gives it back a single time.
        tensors = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(tensors[3])
        without_tensors, needed = ctx.fixed, ctx.needs_input_grad[3:5]

        def compute(grad_out: Tensor, grad_lse: Tensor | None, *saved: Any) -> passes.Gradients:
            *inputs, offsets, dense = saved[:7]
            fixed = without_tensors._replace(tensors=saved[7:])
            return passes.backward(grad_out, grad_lse, tuple(inputs), offsets, dense, fixed, needed)

        once = partial(differentiated_once, "cpu", compute)
        return *of_each_gradient(once, grad_out, grad_lse, *tensors), None


class Weights(Once):
    """Weights and log-sum-exp; see `passes.weights`."""

    backend = "cpu"

    @staticmethod
    def forward(
        query: Tensor,
        key: Tensor,
        offsets: Tensor | None,
        dense: Tensor | None,
        mean: bool,
        fixed: Fixed,
    ) -> tuple[Tensor, Tensor]:
        return passes.weights(query, key, offsets, dense, mean, fixed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        query, key, offsets, dense, _, fixed = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(query, key, output[1], offsets, dense, *fixed.tensors)
        ctx.fixed = fixed._replace(tensors=())
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_weights: Tensor | None, _: Tensor | None) -> Any:
        if grad_weights is None:
            return (None,) * 6
        without_tensors, needed = ctx.fixed, ctx.needs_input_grad[2:4]

        def compute(grad_weights: Tensor, *saved: Any) -> passes.Gradients:
            query, key, lse, offsets, dense, *tensors = saved
            fixed = without_tensors._replace(tensors=tensors)
            return passes.weights_backward(
                grad_weights, query, key, lse, offsets, dense, fixed, needed
            )

        once = partial(differentiated_once, "cpu", compute)
        found = of_each_gradient(once, grad_weights, *ctx.saved_tensors)
        of_query, of_key, _, of_offsets, of_dense = found
        return of_query, of_key, of_offsets, of_dense, None, None
