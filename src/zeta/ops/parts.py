"""Some of the queries, of the keys or of the heads of a call, as a call of its own.

Shape suffixes: B batch, H heads, T target length, S source length.
"""

import dataclasses
from typing import TypeVar

import torch
from torch import Tensor

from zeta import biases, masks
from zeta.ops.call import AttentionCall
from zeta.values import ALL, Value, means

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
"""The same for every head, and for a query or key wherever it stands in the tensor."""

_DIVISIBLE = (
    *_BY_POSITION,
    masks.AllOf,
    masks.AnyOf,
    masks.Dense,
    biases.Sum,
    biases.Dense,
    biases.Bucketed,
    biases.Alibi,
)


class Indivisible(TypeError):  # noqa: N818 - control flow: the caller computes the whole instead
    """A mask or bias of a kind that cannot be cut, because only its author knows what it reads."""


def rows_of(call: AttentionCall, rows: Part) -> AttentionCall:
    """The call of the queries ``rows``, which keep their positions.

    Raises:
        Indivisible: A mask or bias is of an unknown kind.
    """
    return dataclasses.replace(
        call,
        query=call.query[:, :, rows],
        query_positions=_query_positions(call)[:, rows],
        mask=None if call.mask is None else _part(call.mask, ALL, rows, ALL),
        bias=None if call.bias is None else _part(call.bias, ALL, rows, ALL),
    )


def keys_of(call: AttentionCall, keys: Part) -> AttentionCall:
    """The call over the keys ``keys`` alone; all keep their positions, and dropout its draws.

    Nothing of a slice is copied. The results over disjoint keys merge by their log-sum-exps, if
    only one of the calls is left its sinks. Positions that nothing reads are not made.

    Raises:
        Indivisible: A mask or bias is of an unknown kind.
    """
    query_positions, key_positions = call.query_positions, call.key_positions
    if call.has_positions or reads_positions(call, (masks.Dense, biases.Dense, biases.Softcap)):
        query_positions, key_positions = _query_positions(call), _key_positions(call, keys)
    key = call.key[:, :, keys]
    return dataclasses.replace(
        call,
        key=key,
        value=key if call.value is call.key else call.value[:, :, keys],
        query_positions=query_positions,
        key_positions=key_positions,
        mask=None if call.mask is None else _part(call.mask, ALL, ALL, keys),
        bias=None if call.bias is None else _part(call.bias, ALL, ALL, keys),
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
        mask=None if call.mask is None else _part(call.mask, heads, ALL, ALL),
        bias=None if call.bias is None else _part(call.bias, heads, ALL, ALL),
        sinks=None if call.sinks is None else call.sinks[heads],
    )


def _query_positions(call: AttentionCall) -> Tensor:
    if call.query_positions is not None:
        return call.query_positions
    return torch.arange(call.source - call.target, call.source, device=call.query.device)[None]


def _key_positions(call: AttentionCall, keys: Part) -> Tensor:
    if call.key_positions is not None:
        return call.key_positions[:, keys]
    if isinstance(keys, slice) and not torch.compiler.is_compiling():
        # Not those of all keys: many slices of many keys would be quadratic.
        return torch.arange(*keys.indices(call.source), device=call.key.device)[None]
    return torch.arange(call.source, device=call.key.device)[None, keys]


def reads_positions(call: AttentionCall, free: tuple[type[Value], ...]) -> bool:
    """Whether a draw, or a mask or bias that is none of the ``free`` kinds, may ask for them."""
    values = (*masks.conjuncts(call.mask), *biases.summands(call.bias))
    return bool(call.dropout_p) or not all(means(value, *free) for value in values)


def _part(value: ValueT, heads: Part, rows: Part, keys: Part) -> ValueT:
    if value.meaning not in _DIVISIBLE:
        raise Indivisible(f"a {type(value).__name__} cannot be cut")
    if isinstance(value, masks.AllOf | masks.AnyOf | biases.Sum):
        terms = tuple(_part(term, heads, rows, keys) for term in value.terms)
        return dataclasses.replace(value, terms=terms)  # type: ignore[arg-type]  # of its own kind
    if isinstance(value, masks.Dense | biases.Dense):
        return dataclasses.replace(value, tensor=_cut(value.tensor, heads, rows, keys))
    if isinstance(value, biases.Bucketed):
        return dataclasses.replace(value, table=value.table[:, heads])
    if isinstance(value, biases.Alibi):
        return dataclasses.replace(value, slopes=value.slopes[heads])
    return value


def _cut(tensor_BHTS: Tensor, heads: Part, rows: Part, keys: Part) -> Tensor:
    """Heads, rows and columns of a dense tensor, where it has more than one."""
    if tensor_BHTS.shape[1] > 1:
        tensor_BHTS = tensor_BHTS[:, heads]
    if tensor_BHTS.shape[2] > 1:
        tensor_BHTS = tensor_BHTS[:, :, rows]
    if tensor_BHTS.shape[3] > 1:
        tensor_BHTS = tensor_BHTS[..., keys]
    return tensor_BHTS
