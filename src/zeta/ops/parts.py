"""Some of the queries, or some of the heads, of a call, as a call of its own.

Shape suffixes: B batch, H heads, T target length, S source length.
"""

import dataclasses
from typing import TypeVar

import torch
from torch import Tensor

from zeta import biases, masks
from zeta.ops.call import AttentionCall
from zeta.values import ALL, Value

Part = slice | Tensor
"""A slice, or a one-dimensional tensor of indices."""

ValueT = TypeVar("ValueT", bound=Value)

_BY_POSITION = (
    masks.Causal,
    masks.SlidingWindow,
    masks.PrefixLM,
    masks.Documents,
    masks.Padding,
    biases.Softcap,
)
"""The same for every head, and for a query wherever it stands in the tensor."""


class Indivisible(TypeError):  # noqa: N818 - control flow: the caller computes the whole instead
    """A mask or bias of a kind that cannot be cut, because only its author knows what it reads."""


def rows_of(call: AttentionCall, rows: Part) -> AttentionCall:
    """The call of the queries ``rows``, which keep their positions.

    Raises:
        Indivisible: A mask or bias is of an unknown kind.
    """
    positions = call.query_positions
    if positions is None:
        last = call.source
        positions = torch.arange(last - call.target, last, device=call.query.device)[None]
    return dataclasses.replace(
        call,
        query=call.query[:, :, rows],
        query_positions=positions[:, rows],
        mask=None if call.mask is None else _part(call.mask, ALL, rows),
        bias=None if call.bias is None else _part(call.bias, ALL, rows),
    )


def heads_of(call: AttentionCall, heads: Part) -> AttentionCall:
    """The call of the query heads ``heads``, each with a key head to itself.

    Raises:
        Indivisible: A mask or bias is of an unknown kind.
    """
    group = call.heads // call.key_heads
    key_heads = heads
    if group > 1:
        key_heads = torch.arange(call.heads, device=call.query.device)[heads] // group
    key = call.key[:, key_heads]
    return dataclasses.replace(
        call,
        query=call.query[:, heads],
        key=key,
        value=key,
        mask=None if call.mask is None else _part(call.mask, heads, ALL),
        bias=None if call.bias is None else _part(call.bias, heads, ALL),
        sinks=None if call.sinks is None else call.sinks[heads],
    )


def _part(value: ValueT, heads: Part, rows: Part) -> ValueT:
    if isinstance(value, _BY_POSITION):
        return value
    if isinstance(value, masks.AllOf | masks.AnyOf | biases.Sum):
        terms = tuple(_part(term, heads, rows) for term in value.terms)
        return dataclasses.replace(value, terms=terms)  # type: ignore[arg-type]  # of its own kind
    if isinstance(value, masks.Dense | biases.Dense):
        return dataclasses.replace(value, tensor=_cut(value.tensor, heads, rows))
    if isinstance(value, biases.Bucketed):
        return dataclasses.replace(value, table=value.table[:, heads])
    if isinstance(value, biases.Alibi):
        return dataclasses.replace(value, slopes=value.slopes[heads])
    raise Indivisible(f"a {type(value).__name__} cannot be cut")


def _cut(tensor_BHTS: Tensor, heads: Part, rows: Part) -> Tensor:
    """Heads and rows of a dense tensor, where it has more than one."""
    if tensor_BHTS.shape[1] > 1:
        tensor_BHTS = tensor_BHTS[:, heads]
    if tensor_BHTS.shape[2] > 1:
        tensor_BHTS = tensor_BHTS[:, :, rows]
    return tensor_BHTS
