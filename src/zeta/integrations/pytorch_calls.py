"""From the arguments of torch's attention module to an `AttentionCall`, and to its weights.

Shapes: B batch, H heads, T target length, S source length, X extra keys, D head dimension.
"""

import dataclasses
import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from zeta import masks
from zeta.biases import Bias
from zeta.masks import Mask
from zeta.nn.masking import Sizes, hide_or_add, join, join_one, seen_mask, structured_mask
from zeta.ops.attention import run, run_weights
from zeta.ops.call import AttentionCall
from zeta.ops.deferred import Compute
from zeta.ops.dropout import keep_mask
from zeta.ops.parts import Indivisible, heads_of
from zeta.ops.weights import lazy_weights
from zeta.transforms import is_traced
from zeta.values import check_device


def attention_call(
    query_BHTD: Tensor,
    key_BHSD: Tensor,
    value_BHSD: Tensor,
    *,
    num_extra: int,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    dropout_p: float,
) -> AttentionCall:
    """Describe the attention that torch's module is asked for.

    Args:
        query_BHTD: Queries.
        key_BHSD: Keys; the last ``num_extra`` are the module's own, which every query sees.
        value_BHSD: Values.
        num_extra: Keys that masks say nothing about.
        attn_mask: ``(T, S)`` or ``(B * H, T, S)`` without the extra keys; bool, True hides, or
            floating point, added to the scores.
        key_padding_mask: ``(B, S)`` without the extra keys, likewise.
        is_causal: Together with a square ``attn_mask``, the hint that it is the causal mask, which
            is then not read; alone, hide later keys.
        dropout_p: 0 except in training.

    Returns:
        The call; an empty one, of no queries or no keys, is not for a backend: see `output_of`.

    Raises:
        ValueError: A mask has the wrong shape or is on another device.
        TypeError: A mask is neither bool nor floating point.
    """
    device = query_BHTD.device
    batch, heads, target, _ = query_BHTD.shape
    source = key_BHSD.shape[2] - num_extra
    if attn_mask is not None:
        attn_mask = _over_heads(attn_mask, (batch, heads, target, source))
        if is_causal and target == source and not attn_mask.requires_grad:
            attn_mask = None
        is_causal = attn_mask is None
    if key_padding_mask is not None:
        _check_padding(key_padding_mask, batch, source, device)
    if _is_empty(query_BHTD, key_BHSD):
        return AttentionCall(query_BHTD, key_BHSD, value_BHSD)
    mask = structured_mask(is_causal, None, (batch, heads, target, source), ordered=True)
    positions = None
    if num_extra:
        # The extra keys come last: columns of False and of 0.0 let every query see them.
        attn_mask, key_padding_mask = (
            None if tensor is None else F.pad(tensor, (0, num_extra))
            for tensor in (attn_mask, key_padding_mask)
        )
        if mask is not None:
            mask |= masks.keep(torch.arange(source + num_extra, device=device) >= source)
            positions = torch.arange(source - target, source, device=device)
    bias: Bias | None = None
    if attn_mask is not None:
        sizes = (batch, heads, target, source + num_extra)
        mask, bias = join(attn_mask, None, None, mask, sizes, device)
    if key_padding_mask is not None:
        found = padding_value(key_padding_mask)
        if found is not None:
            mask, bias = join_one(found, mask, bias)
    return AttentionCall.checked(
        query_BHTD, key_BHSD, value_BHSD, mask=mask, bias=bias, dropout_p=dropout_p,
        query_positions=positions,
    )  # fmt: skip


def output_of(call: AttentionCall) -> Tensor:
    """``(B, H, T, D)``. Without keys there is nothing to see, as where all are hidden: 0."""
    if _is_empty(call.query, call.key):
        # Selected, not made anew: the parameters keep their place in autograd's graph.
        nowhere = torch.zeros((), dtype=torch.bool, device=call.query.device)
        return torch.where(nowhere, call.query, 0.0)
    return run(call)[0]


def _is_empty(query_BHTD: Tensor, key_BHSD: Tensor) -> bool:
    return 0 in query_BHTD.shape or 0 in key_BHSD.shape


def padding_value(key_padding_mask: Tensor) -> Mask | Bias | None:
    """What a ``(B, S)`` padding mask says: the most structured value that says the same.

    Where its numbers can be read at no cost, lengths instead of a tensor let a kernel skip the
    padding; ``nn.TransformerEncoderLayer`` makes 0 and -inf of every mask it is given, which is
    turned back.
    """
    if not _is_readable(key_padding_mask):
        return hide_or_add(key_padding_mask[:, None, None])
    hidden = key_padding_mask
    if hidden.dtype != torch.bool:
        hidden = key_padding_mask == float("-inf")
        infinite = torch.zeros_like(key_padding_mask).masked_fill_(hidden, float("-inf"))
        if not torch.equal(key_padding_mask, infinite):
            return hide_or_add(key_padding_mask[:, None, None])
    return seen_mask(~hidden)


def _is_readable(tensor: Tensor) -> bool:
    """Whether its numbers are there, and reading them neither waits nor binds what is traced."""
    # Of the subclasses some hold no numbers, as a FakeTensor.
    plain = type(tensor) is Tensor and tensor.device.type == "cpu" and not tensor.requires_grad
    return plain and not is_traced()


def _over_heads(attn_mask: Tensor, sizes: Sizes) -> Tensor:
    """``(T, S)`` or ``(B * H, T, S)`` as ``(1, 1, T, S)`` or ``(B, H, T, S)``."""
    batch, heads, target, source = sizes
    if attn_mask.shape == (target, source):
        return attn_mask[None, None]
    if attn_mask.shape == (batch * heads, target, source):
        return attn_mask.reshape(batch, heads, target, source)
    raise ValueError(
        f"attn_mask must have shape ({target}, {source}) or ({batch * heads}, {target}, {source}); "
        f"got {tuple(attn_mask.shape)}"
    )


def _check_padding(key_padding_mask: Tensor, batch: int, source: int, device: torch.device) -> None:
    if key_padding_mask.shape != (batch, source):
        raise ValueError(
            f"key_padding_mask must have shape ({batch}, {source}); "
            f"got {tuple(key_padding_mask.shape)}"
        )
    if key_padding_mask.dtype != torch.bool and not key_padding_mask.is_floating_point():
        raise TypeError(
            f"key_padding_mask must be bool or floating point; got {key_padding_mask.dtype}"
        )
    check_device("key_padding_mask", key_padding_mask, device)


def weights_of(call: AttentionCall, *, average: bool, after_dropout: bool, batched: bool) -> Tensor:
    """The weights of a call, computed when they are first used.

    Args:
        call: Of the output.
        average: Over the heads.
        after_dropout: As they were multiplied with the values; otherwise before dropout.
        batched: Keep the dimension of the batch.

    Returns:
        ``(B, T, S)`` averaged, otherwise ``(B, H, T, S)``.
    """
    if _is_empty(call.query, call.key):
        sizes = (call.batch, call.target, call.key.shape[2])
        weights = call.query.new_zeros(sizes if average else (sizes[0], call.heads, *sizes[1:]))
        return weights if batched else weights.squeeze(0)
    compute: Compute = run_weights
    of_weights = call.of_weights(mean=average)
    if after_dropout and call.dropout_p:
        compute = functools.partial(_dropped_weights, call.heads)
        of_weights = dataclasses.replace(of_weights, dropout_p=call.dropout_p, seed=call.seed)
    return lazy_weights(of_weights, compute, batched=batched)


def _dropped_weights(heads: int, call: AttentionCall) -> Tensor:
    """Weights after dropout; averaged, one head at a time."""
    if call.heads != heads:
        raise Indivisible("the dropout of a head goes by its number among all")
    if call.result == "weights":
        return _dropped_heads(call, slice(0, heads))
    total = _dropped_heads(call, slice(0, 1)).to(call.wide_dtype)
    for head in range(1, heads):
        total = total + _dropped_heads(call, slice(head, head + 1))
    return (total.squeeze(1) / heads).to(call.query.dtype)


def _dropped_heads(call: AttentionCall, heads: slice) -> Tensor:
    part = heads_of(call, heads).of_weights(mean=False)
    kept = keep_mask(call, call.tile(heads=heads))
    return torch.where(kept, run_weights(part) / (1.0 - call.dropout_p), 0.0)
