"""Calls with common masks and biases, straight to the library.

To describe a call, choose for it and take it apart again takes longer than a short call itself.
What this computes is what `cpu.run` would; whatever is not plainly right is left to it.

Shape suffixes: B batch, H query heads, G key heads, T target length, S source length, D head
dimension.
"""

import math
from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor
from torch.autograd import Function

from zeta.ops.backends.cpu import library, passes
from zeta.ops.backends.cpu.description import Fixed
from zeta.ops.buffers import rows
from zeta.ops.functions import Once, can_be_differentiated, differentiated_once
from zeta.ops.plain_lowering import LATER_KEYS, NOTHING, NUM_NUMBERS, Plain
from zeta.ops.precision import Precision, float32_precision
from zeta.transforms import of_each_gradient

_PRECISIONS = (None, *get_args(Precision))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    plain: Plain,
    precision: Precision | None,
) -> Tensor | None:
    """The output ``(B, H, T, D)``; None where the call must be checked and described.

    Args:
        query: ``(B, H, T, D)``, if all is well; a plain tensor on the CPU, which nothing watches.
        key, value: ``(B, G, S, D)``.
        scale: Of the scores; ``1 / sqrt(D)`` by default.
        plain: Lengths int64, slopes float32, both contiguous, a table not float16, tensors for
            pairs broadcastable to ``(B, H, T, S)``, if all is well.
        precision: As in `zeta.attention`.
    """
    if not type(key) is type(value) is Tensor:
        return None
    # What is negated is so on paper only, and C would not see it.
    if query.is_neg() or key.is_neg() or value.is_neg():
        return None
    if precision not in _PRECISIONS or library.obstacle() is not None:
        return None
    native = library.load()
    direct = native.direct
    if direct is None:
        return None
    is_high = native.has_tiles and float32_precision(precision) == "high"
    learned = dense = None
    numbers: tuple[Any, ...]
    tensors: tuple[Any, ...]
    if plain is NOTHING or plain is LATER_KEYS:
        numbers, tensors = (plain.causal,), ()
    else:
        learned, dense = plain.offsets, plain.dense
        for tensor in (plain.padding_B, plain.table, plain.slopes_H, dense):
            if tensor is not None and tensor.is_neg():
                return None
        if learned is not None:
            plain = plain._replace(offsets=learned.detach().float().contiguous())
        numbers, tensors = plain[:NUM_NUMBERS], plain[NUM_NUMBERS:]
    options = scale, is_high, torch.get_num_threads(), *numbers, *tensors
    out = torch.empty_like(query)
    if torch.is_grad_enabled() and (
        query.requires_grad or key.requires_grad or value.requires_grad or learned is not None
        or (dense is not None and dense.requires_grad)
    ):  # fmt: skip
        lse = direct.attend_with_lse(query, key, value, out, *options)
        if type(lse) is Tensor:
            saved = query, key, value, out, lse, *tensors
            kept = scale, is_high, numbers
            return _Attended.record(query, key, value, learned, dense, saved, kept)
        answer = lse
    else:
        answer = direct.attend(query, key, value, out, *options)
    return out if library.is_done(answer) else None


_Options = tuple[float | None, bool, tuple[Any, ...]]


class _Attended(Once):
    """The output, made already, with the gradients of a plain call."""

    backend = "cpu"

    @classmethod
    def record(cls, *args: Any) -> Tensor:
        """`apply` outside of torch's transforms, of tensors that were read."""
        found: Tensor = super(Function, cls).apply(*args)  # type: ignore[misc]  # C's
        return found

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        learned: Tensor | None,
        dense: Tensor | None,
        saved: tuple[Tensor | None, ...],
        options: _Options,
    ) -> Tensor | None:
        ctx.save_for_backward(*saved)
        ctx.options = options
        return saved[3]

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        options, needed = ctx.options, ctx.needs_input_grad
        if not can_be_differentiated():
            return *_gradients(grad_out, ctx.saved_tensors, options, needed), None, None

        def compute(grad_out: Tensor, *saved: Any) -> tuple[Tensor | None, ...]:
            return _gradients(grad_out, saved, options, needed)

        return *differentiated_once("cpu", compute, grad_out, *ctx.saved_tensors), None, None


_OFFSETS, _DENSE = (Plain._fields.index(name) - NUM_NUMBERS for name in ("offsets", "dense"))


def _gradients(
    grad_out: Tensor,
    saved: Sequence[Tensor],
    options: _Options,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Of query, key, value, and, where needed, of offsets and a dense bias."""
    query, key, value, out, lse, *tensors = saved
    scale, is_high, numbers = options
    grad_offsets = grad_dense = None
    if needed[3]:
        grad_offsets = tensors[_OFFSETS].new_empty(tensors[_OFFSETS].shape)
    if needed[4]:
        grad_dense = tensors[_DENSE].new_empty(tensors[_DENSE].shape, dtype=torch.float32)
    made = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    if not grad_out.is_contiguous() or grad_out.is_neg():
        grad_out = rows(grad_out)
    direct = library.load().direct
    assert direct is not None
    # C would not see that one is negated; whoever saved them may have given that back.
    is_negated = query.is_neg() or key.is_neg() or value.is_neg() or out.is_neg() or lse.is_neg()
    if tensors and not is_negated:
        is_negated = any(tensor is not None and tensor.is_neg() for tensor in tensors)
    if not is_negated:
        answer = direct.differentiate(
            query, key, value, out, lse, grad_out, *made, grad_offsets, grad_dense,
            scale, is_high, torch.get_num_threads(), *numbers, *tensors,
        )  # fmt: skip
        if library.is_done(answer):
            if grad_dense is not None:
                grad_dense = grad_dense.to(tensors[_DENSE].dtype)
            return *made, grad_offsets, grad_dense
    # Such tensors, or others of other strides or of a class of their own; or there are many
    # gradients at once.
    plain = Plain(*numbers, *tensors)
    lowered = plain.lowered(1.0 / math.sqrt(query.shape[3]) if scale is None else scale)
    fixed, offsets, dense = Fixed(*lowered.fixed(), is_high), lowered.offsets, plain.dense
    inputs = query, key, value, out, lse

    def compute(grad_out: Tensor) -> passes.Gradients:
        return passes.backward(
            grad_out, None, inputs, offsets, dense, fixed, (needed[3], needed[4])
        )

    return of_each_gradient(compute, grad_out)
