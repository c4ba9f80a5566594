"""What torch's attention module may be given: batched, unbatched and nested tensors.

Shapes: B batch, T target length, S source length, E embedding.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zeta import masks
from zeta.ops.call import AttentionCall


def check_inputs(
    query: Tensor, key: Tensor, value: Tensor, sizes: Sequence[int], *, batch_first: bool
) -> None:
    """Check the inputs against the module and each other.

    Args:
        query, key, value: As `MultiheadAttention.forward` takes them.
        sizes: Features of each.
        batch_first: Where the batch is.

    Raises:
        TypeError: One is not a tensor.
        ValueError: A shape is wrong, or a nested tensor is not supported.
    """
    named = {"query": query, "key": key, "value": value}
    for name, tensor in named.items():
        check_tensor(name, tensor)
    if query.is_nested or key.is_nested or value.is_nested:
        _check_nested(query, key, value, sizes[0], batch_first)
        return
    layout = ("batch", "length") if batch_first else ("length", "batch")
    for (name, tensor), size in zip(named.items(), sizes, strict=True):
        dims = tensor.dim()
        if dims != query.dim() or dims not in (2, 3) or tensor.shape[-1] != size:
            shapes = {2: f"(length, {size})", 3: f"({', '.join(layout)}, {size})"}
            allowed = shapes.get(query.dim(), " or ".join(shapes.values()))
            if name == "query":
                allowed = " or ".join(shapes.values())
            raise ValueError(f"{name} must have shape {allowed}; got {tuple(tensor.shape)}")
    if key.shape[:-1] != value.shape[:-1]:
        raise ValueError(
            f"key and value must have one length and batch size; got {tuple(key.shape)} and "
            f"{tuple(value.shape)}"
        )
    dim = layout.index("batch")
    if query.dim() == 3 and query.shape[dim] != key.shape[dim]:
        raise ValueError(
            f"query and key must have one batch size; got {query.shape[dim]} and {key.shape[dim]}"
        )


def check_tensor(name: str, value: object, *, optional: bool = False) -> None:
    """Raise TypeError unless ``value`` is a tensor, or None where it is optional."""
    if not isinstance(value, Tensor) and not (optional and value is None):
        kind = "a tensor or None" if optional else "a tensor"
        raise TypeError(f"{name} must be {kind}; got {type(value).__name__}")


def _check_nested(query: Tensor, key: Tensor, value: Tensor, size: int, batch_first: bool) -> None:
    if not (query is key and key is value and batch_first):
        raise ValueError(
            "a nested tensor must be query, key and value in one, and the module have "
            "batch_first=True"
        )
    if query.layout != torch.strided:
        raise ValueError(f"a nested tensor must have layout torch.strided; got {query.layout}")
    if query.dim() != 3 or query.size(-1) != size:
        raise ValueError(f"a nested query must hold sequences of {size} features")


def check_unbatched_padding(key_padding_mask: Tensor | None, source: int) -> Tensor | None:
    """``(S,)`` as ``(1, S)``; ValueError for another shape."""
    if key_padding_mask is None:
        return None
    if key_padding_mask.shape != (source,):
        raise ValueError(
            f"key_padding_mask must have shape ({source},); got {tuple(key_padding_mask.shape)}"
        )
    return key_padding_mask.unsqueeze(0)


def each(
    function: Callable[[Tensor], Tensor], query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The function of each; what was one tensor stays one."""
    new_query = function(query)
    new_key = new_query if key is query else function(key)
    return new_query, new_key, new_key if value is key else function(value)


def padding_of_nested(
    query: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None
) -> Tensor:
    """``(B, T)``, True where a nested tensor has no token.

    Raises:
        ValueError: There is a mask beside it.
    """
    if attn_mask is not None or key_padding_mask is not None:
        raise ValueError("attn_mask and key_padding_mask must be None with a nested tensor")
    lengths = torch.tensor(_lengths(query), device=query.device)
    return torch.arange(max(_lengths(query)), device=query.device) >= lengths[:, None]


def nested_like(padded: Tensor, nested: Tensor) -> Tensor:
    """``(B, T, E)`` without the padding that ``nested`` does not have."""
    rows = zip(padded, _lengths(nested), strict=True)
    return torch.nested.as_nested_tensor([row[:length] for row, length in rows])


def without_queries(call: AttentionCall, padding_BT: Tensor) -> AttentionCall:
    """The call with queries that are padding seeing nothing, as torch returns their weights."""
    rows = masks.drop(padding_BT[:, None, :, None])
    return dataclasses.replace(call, mask=rows if call.mask is None else call.mask & rows)


def _lengths(nested: Tensor) -> list[int]:
    return [part.shape[0] for part in nested.unbind()]
