"""Forward and backward passes: outputs are allocated, a record is filled in, the library runs.

Shape suffixes: B batch, H query heads, G key heads, T target length, S source length, R offsets.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from zeta.ops.backends.cpu import library
from zeta.ops.backends.cpu.description import (
    Filled,
    Fixed,
    address,
    describe,
    describe_plane,
    describe_scores,
)
from zeta.ops.backends.cpu.layout import Part
from zeta.ops.buffers import empty_rows, rows, written_out

STEP_ROWS, STEP_ROWS_BESIDE_TILES = 48, 16
"""As in ``native/abi.h``."""


_OUT = Part("out", "lse")
_LSE = Part("lse")
_GRAD_OUT = Part("grad_out", "grad_lse")
_GRADIENTS = Part("grad_query", "grad_value")
_GRAD_OFFSETS = Part("grad_offsets")
_GRAD_DENSE = Part("grad_dense")
_WEIGHTS = Part("mean_weights", "weights")
_GRAD_WEIGHTS = Part("grad_weights")
_MEAN = Part("mean_weights")


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor | None,
    dense: Tensor | None,
    fixed: Fixed,
) -> tuple[Tensor, Tensor]:
    """The output ``(B, H, T, Dv)`` and its log-sum-exp ``(B, H, T)`` in float32."""
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    return _forward(query, key, value, offsets, dense, fixed, lse), lse


def step_rows() -> int:
    """Up to so many queries that share a key head, keys are read once for all of them."""
    has_tiles = library.obstacle() is None and library.load().multiplies_tiles
    return STEP_ROWS_BESIDE_TILES if has_tiles else STEP_ROWS


def is_step(query: Tensor, key: Tensor) -> bool:
    """Whether there are no more queries than that."""
    return query.shape[2] * query.shape[1] <= step_rows() * key.shape[1]


def step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor | None,
    dense: Tensor | None,
    fixed: Fixed,
) -> Tensor:
    """The output alone, of what `is_step`."""
    return _forward(query, key, value, offsets, dense, fixed, None)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor | None,
    dense: Tensor | None,
    fixed: Fixed,
    lse: Tensor | None,
) -> Tensor:
    out = empty_rows(query, value.shape[3])
    query, key, value = rows(query), rows(key), rows(value)
    native = library.load()
    record = describe(query, key, value, fixed)
    kept = describe_scores(record, offsets, dense, fixed)
    to_lse = 0 if lse is None else lse.data_ptr()
    _OUT.write(record, out.data_ptr(), *out.stride()[:3], to_lse)
    answer = native.decode(record) if is_step(query, key) else native.forward(record)
    del kept
    library.check(answer)
    return out


class Gradients(NamedTuple):
    """Of the operands; None where none was asked for."""

    query: Tensor
    key: Tensor
    value: Tensor | None
    offsets: Tensor | None
    dense: Tensor | None


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    offsets: Tensor | None,
    dense: Tensor | None,
    fixed: Fixed,
    needed: tuple[bool, bool],
) -> Gradients:
    """Gradients of `forward`; ``inputs`` are query, key, value, out and lse."""
    *operands, lse = inputs
    query, key, value, out, grad_out = map(rows, (*operands, grad_out))
    # As it was made; but who saved it may have packed it otherwise.
    lse = written_out(lse).contiguous()
    record = describe(query, key, value, fixed)
    _OUT.write(record, address(out), *out.stride()[:3], address(lse))
    grad_lse = None if grad_lse is None else written_out(grad_lse).float().contiguous()
    incoming_lse = 0 if grad_lse is None else address(grad_lse)
    _GRAD_OUT.write(record, address(grad_out), *grad_out.stride()[:3], incoming_lse)
    return _gradients(record, inputs[:3], offsets, dense, fixed, needed)


def weights(
    query: Tensor,
    key: Tensor,
    offsets: Tensor | None,
    dense: Tensor | None,
    mean: bool,
    fixed: Fixed,
) -> tuple[Tensor, Tensor]:
    """Weights ``(B, H, T, S)`` or their mean ``(B, T, S)``, and the log-sum-exp."""
    return _weights(query, key, None, None, offsets, dense, mean, fixed)


def output_and_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor | None,
    dense: Tensor | None,
    mean: bool,
    fixed: Fixed,
) -> tuple[Tensor, Tensor]:
    """The output ``(B, H, T, Dv)`` of a call that drops nothing, and its `weights`."""
    assert not fixed.dropout_p
    out = empty_rows(query, value.shape[3])
    return out, _weights(query, key, rows(value), out, offsets, dense, mean, fixed)[0]


def _weights(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    out: Tensor | None,
    offsets: Tensor | None,
    dense: Tensor | None,
    mean: bool,
    fixed: Fixed,
) -> tuple[Tensor, Tensor]:
    batch, heads, target, _ = query.shape
    planes = (batch,) if mean else (batch, heads)
    found = query.new_empty((*planes, target, key.shape[2]))
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    query, key = rows(query), rows(key)
    native = library.load()
    record = describe(query, key, value, fixed)
    kept = describe_scores(record, offsets, dense, fixed)
    _WEIGHTS.write(record, mean, found.data_ptr())
    to_out = (0, 0, 0, 0) if out is None else (out.data_ptr(), *out.stride()[:3])
    _OUT.write(record, *to_out, lse.data_ptr())
    answer = native.weights(record)
    del kept
    library.check(answer)
    return found, lse


def weights_backward(
    grad_weights: Tensor,
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    offsets: Tensor | None,
    dense: Tensor | None,
    fixed: Fixed,
    needed: tuple[bool, bool],
) -> Gradients:
    """Gradients of `weights`."""
    operands = query, key
    query, key, grad_weights = rows(query), rows(key), rows(grad_weights).contiguous()
    lse = written_out(lse).contiguous()
    record = describe(query, key, None, fixed)
    _MEAN.write(record, grad_weights.dim() == 3)
    _GRAD_WEIGHTS.write(record, address(grad_weights))
    _LSE.write(record, address(lse))
    return _gradients(record, operands, offsets, dense, fixed, needed)


def _gradients(
    record: Filled,
    operands: tuple[Tensor, ...],
    offsets: Tensor | None,
    dense: Tensor | None,
    fixed: Fixed,
    needed: tuple[bool, bool],
) -> Gradients:
    """Run the backward pass of a record that has what arrives; the caller keeps those tensors.

    Args:
        operands: As they were given, not as `rows`: gradients lie as compilers are told.
    """
    kept = describe_scores(record, offsets, dense, fixed)
    found: list[Tensor | None] = []
    places: list[int] = []
    for operand in operands:
        gradient = empty_rows(operand, operand.shape[3])
        found.append(gradient)
        places += (gradient.data_ptr(), *gradient.stride()[:3])
    if len(operands) == 2:
        found.append(None)
        places += (0, 0, 0, 0)
    _GRADIENTS.write(record, *places)
    grad_offsets = grad_dense = None
    if offsets is not None and needed[0]:
        grad_offsets = offsets.new_empty(offsets.shape, dtype=torch.float32)
        _GRAD_OFFSETS.write(record, grad_offsets.data_ptr())
    if dense is not None and needed[1]:
        grad_dense = dense.new_empty(dense.shape, dtype=torch.float32)
        describe_plane(record, _GRAD_DENSE, grad_dense)
    answer = library.load().backward(record)
    del kept
    library.check(answer)
    if dense is not None and grad_dense is not None:
        grad_dense = grad_dense.to(dense.dtype)
    query, key, value = found
    assert query is not None
    assert key is not None
    return Gradients(query, key, value, grad_offsets, grad_dense)
