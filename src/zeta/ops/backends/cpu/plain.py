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
from zeta.ops.functions import Once, differentiated_once
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
    out = torch.empty_like(query)
    is_high = native.has_tiles and float32_precision(precision) == "high"
    learned, dense = plain.offsets, plain.dense
    if not _is_short(plain):
        signed = plain.padding_B, plain.table, plain.slopes_H, dense
        if any(tensor is not None and tensor.is_neg() for tensor in signed):
            return None
        if learned is not None:
            plain = plain._replace(offsets=learned.detach().float().contiguous())
    options = _options(scale, is_high, plain)
    if torch.is_grad_enabled() and (
        query.requires_grad or key.requires_grad or value.requires_grad or learned is not None
        or (dense is not None and dense.requires_grad)
    ):  # fmt: skip
        lse = direct.attend_with_lse(query, key, value, out, *options)
        if type(lse) is Tensor:
            options = scale, is_high, plain
            return _Attended.record(query, key, value, learned, dense, (out, lse), options)
        answer = lse
    else:
        answer = direct.attend(query, key, value, out, *options)
    return out if library.is_done(answer) else None


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
        _: Tensor | None,
        dense: Tensor | None,
        made: tuple[Tensor, Tensor],
        options: tuple[float | None, bool, Plain],
    ) -> Tensor:
        scale, is_high, plain = options
        if _is_short(plain):
            ctx.save_for_backward(query, key, value, *made)
            ctx.options = options
        else:
            ctx.save_for_backward(query, key, value, *made, *plain[NUM_NUMBERS:])
            ctx.options = scale, is_high, plain[:NUM_NUMBERS]
        return made[0]

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        scale, is_high, plain = ctx.options
        needed = ctx.needs_input_grad[3:5]

        def compute(grad_out: Tensor, *saved: Any) -> tuple[Tensor | None, ...]:
            return _gradients(grad_out, saved, scale, is_high, plain, needed)

        return *differentiated_once("cpu", compute, grad_out, *ctx.saved_tensors), None, None


def _is_short(plain: Plain) -> bool:
    """Whether it says no more than if later keys are hidden."""
    return plain is NOTHING or plain is LATER_KEYS


def _options(scale: float | None, is_high: bool, plain: Plain) -> tuple[Any, ...]:
    """What a direct call is told beside its tensors."""
    if _is_short(plain):
        return scale, is_high, torch.get_num_threads(), plain.causal
    return scale, is_high, torch.get_num_threads(), *plain


def _gradients(
    grad_out: Tensor,
    saved: Sequence[Tensor],
    scale: float | None,
    is_high: bool,
    plain: Plain | tuple[Any, ...],
    needed: tuple[bool, bool],
) -> tuple[Tensor | None, ...]:
    """Of query, key, value, and, where needed, of offsets and a dense bias."""
    query, key, value, out, lse, *others = saved
    inputs = query, key, value, out, lse
    if not isinstance(plain, Plain):  # Its numbers alone: the tensors were saved.
        plain = Plain(*plain, *others)
    made = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    grad_offsets = grad_dense = None
    if plain.offsets is not None and needed[0]:
        grad_offsets = plain.offsets.new_empty(plain.offsets.shape)
    if plain.dense is not None and needed[1]:
        grad_dense = plain.dense.new_empty(plain.dense.shape, dtype=torch.float32)
    direct = library.load().direct
    assert direct is not None
    if not grad_out.is_contiguous() or grad_out.is_neg():
        grad_out = rows(grad_out)
    options = _options(scale, is_high, plain)
    # C would not see that one is negated; whoever saved them may have given that back.
    if not any(tensor is not None and tensor.is_neg() for tensor in saved):
        answer = direct.differentiate(*inputs, grad_out, *made, grad_offsets, grad_dense, *options)
        if library.is_done(answer):
            if plain.dense is not None and grad_dense is not None:
                grad_dense = grad_dense.to(plain.dense.dtype)
            return *made, grad_offsets, grad_dense
    # Such tensors, or others of other strides or of a class of their own; or there are many
    # gradients at once.
    lowered = plain.lowered(1.0 / math.sqrt(query.shape[3]) if scale is None else scale)
    fixed, offsets, dense = Fixed(*lowered.fixed(), is_high), lowered.offsets, plain.dense

    def compute(grad_out: Tensor) -> passes.Gradients:
        return passes.backward(grad_out, None, inputs, offsets, dense, fixed, needed)

    return of_each_gradient(compute, grad_out)
