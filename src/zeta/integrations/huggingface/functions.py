"""The two functions that Transformers calls: one makes masks, the other attends.

Shape suffixes: B batch, H heads, G key heads, T target length, S source length, D head dimension.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zeta.biases import Bias, Dense, Softcap
from zeta.integrations.huggingface.models import check_calls_by_name, joins_numbers
from zeta.integrations.huggingface.patterns import as_mask, recognise
from zeta.integrations.huggingface.standin import MaskStandIn, Pattern
from zeta.integrations.huggingface.t5 import TableBias, has_no_bias
from zeta.masks import Causal, Mask, SlidingWindow, keep
from zeta.nn.masking import seen_mask
from zeta.ops.attention import run, run_weights
from zeta.ops.call import AttentionCall
from zeta.ops.weights import lazy_weights
from zeta.transforms import is_traced

INEXPRESSIBLE = {
    "cache": "a paged cache of continuous batching",
    "indices": "keys chosen by an indexer",
    "block_indices": "blocks of keys chosen by an indexer",
    "sinks": "sinks that depend on the query",
}
"""Arguments of some models' attention that change the result, and that Zeta has nothing for."""


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor:
    """What a model's attention is given as its mask; called by Transformers once a forward pass.

    Arguments are those of Transformers' own mask functions.

    Returns:
        A `MaskStandIn` wherever the mask is one that Zeta has a value for. Otherwise the dense bool
        tensor ``(B, 1, T, S)``: for an unknown mask function, inside ``torch.compile``, and for one
        query over a static cache, which compiled code may receive; or one of numbers to be added,
        for a model that joins it to such.

    Raises:
        ValueError: The model computes its attention itself, or ``attention_mask`` is not
            ``(B, positions)``.
    """
    # Not the module from its package, which loads lazily: torch 2.11 cannot trace that.
    from transformers.masking_utils import causal_mask_function, eager_mask, sdpa_mask

    check_calls_by_name(kwargs.get("config"))
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            "attention_mask must be (batch, length), or your own (batch, 1 or heads, target, "
            f"source); got {tuple(attention_mask.shape)}"
        )
    function = causal_mask_function if mask_function is None else mask_function
    numbers = joins_numbers(kwargs.get("config"))
    dense = functools.partial(
        eager_mask if numbers else sdpa_mask,
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=function,
        attention_mask=attention_mask,
        use_vmap=use_vmap,
        device=device,
        **kwargs,
    )
    # None would mean none: not every attention says whether it is causal.
    dense = functools.partial(dense, allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    if numbers or is_traced():
        made: Tensor = dense()
        return made
    static = isinstance(q_offset, Tensor)
    rule = None if use_vmap or (static and q_length == 1) else recognise(function)
    if rule is None or not rule.has_value:
        unstructured: Tensor = dense()
        return unstructured
    # A static cache counts on in place: its tensor is read now.
    first_query = int(q_offset)
    keys = min(kv_length, first_query + q_length - kv_offset) if rule.causal else kv_length
    value = _joined(as_mask(rule, keys), attention_mask, kv_offset, keys)
    pattern = Pattern(value, None if keys == kv_length else keys)
    sizes = (batch_size, 1, q_length, kv_length)
    later = functools.partial(dense, q_offset=first_query)
    return MaskStandIn.of(pattern, sizes, torch.device(device), later)


def _joined(
    value: Mask | None, attention_mask: Tensor | None, kv_offset: int, keys: int
) -> Mask | None:
    """With the padding of a ``(B, positions)`` mask; positions past its end are padding."""
    if attention_mask is None:
        return value
    seen = attention_mask[:, kv_offset : kv_offset + keys]
    if seen.shape[1] < keys:
        seen = F.pad(seen, (0, keys - seen.shape[1]))
    # Waits for the device, as Transformers does for its own implementations.
    padding = seen_mask(seen.bool())
    if value is None or padding is None:
        return value if padding is None else padding
    return value & padding


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | TableBias | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    output_attentions: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """A model's attention; called by Transformers in every attention module.

    Args:
        module: The attention module.
        query: ``(B, H, T, D)``; or ``(1, H, T, D)``, the same for all sequences.
        key, value: ``(B, G, S, D)``.
        attention_mask: What `mask` made, or one's own, of a shape that can be broadcast to
            ``(B, H, T, S)``: bool, True: seen; or float, added. With None, causal attention where
            ``is_causal`` or the module says so.
        dropout, scaling, is_causal, softcap, sliding_window, output_attentions: As Transformers'
            own implementations take them.
        position_bias: Added to the scores: ``(1 or B, H, T, S)``, or T5's table.
        s_aux: ``(H,)``, sinks; by default those of the module, if it has any.
        kwargs: What other implementations need.

    Returns:
        ``(B, T, H, D)``, contiguous, and the weights ``(B, H, T, S)``, lazily unless they are few
        and asked for. Inside ``torch.compile`` they are None unless ``output_attentions`` asks for
        them.

    Raises:
        ValueError: An argument asks for what Zeta cannot do.
    """
    for name, meaning in INEXPRESSIBLE.items():
        if kwargs.get(name) is not None:
            raise ValueError(
                f"attn_implementation='zeta' cannot do {meaning} (the argument {name!r} of "
                f"{type(module).__name__}); use another attn_implementation for this model"
            )
    if query.shape[0] == 1 and key.shape[0] > 1:
        query = query.expand(key.shape[0], -1, -1, -1)
    pattern = _pattern(module, query, key, attention_mask, is_causal, sliding_window)
    static = pattern.keys is not None or hasattr(key, "_dynamo_static_input_type")
    unused = 0
    if pattern.keys is not None:
        unused = key.shape[2] - pattern.keys
        key, value = key[:, :, : pattern.keys], value[:, :, : pattern.keys]
    table = position_bias if isinstance(position_bias, TableBias) else None
    call = AttentionCall.checked(
        query,
        key,
        value,
        mask=pattern.mask,
        bias=_bias(module, attention_mask, position_bias, softcap, key.shape[2]),
        dropout_p=dropout,
        scale=scaling,
        query_positions=None if table is None else table.query_positions(query, key),
        sinks=module._parameters.get("sinks") if s_aux is None else s_aux,
    )
    # Some models view it in another shape: the implementations of Transformers are contiguous.
    out = run(call)[0].transpose(1, 2).contiguous()
    must_be_asked_for, few = static or torch.compiler.is_compiling(), _are_few(query, key)
    wanted = (must_be_asked_for or few) and (output_attentions or _captures_weights())
    if must_be_asked_for and not wanted:
        return out, None
    weights_call = call.of_weights(mean=False)
    if not static and not (few and wanted):
        return out, lazy_weights(weights_call, run_weights)
    # A static cache will be written to: now or never.
    return out, F.pad(run_weights(weights_call), (0, unused))


def _are_few(query: Tensor, key: Tensor) -> bool:
    """Whether weights are fewer than the numbers of the keys, which lazy ones would keep alive.

    So they are in a step of ``generate()``, which gathers those of every step, each of other keys.
    Where something needs a gradient or is traced, it keeps the keys anyway.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return query.shape[1] * query.shape[2] < key.shape[1] * key.shape[3]


def _captures_weights() -> bool:
    """Whether the model running gathers weights; not all models tell their attention."""
    from transformers.utils import output_capturing

    gathered = output_capturing._active_collector.get()
    return gathered is not None and any("attentions" in name for name in gathered)


def _pattern(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    is_causal: bool | None,
    sliding_window: int | None,
) -> Pattern:
    """What the queries see, of whatever a model hands on as its mask."""
    if isinstance(attention_mask, MaskStandIn):
        fits = attention_mask.shape[2:] == (query.shape[2], key.shape[2])
        if fits and not attention_mask.is_made:
            return attention_mask.pattern
        # Made for other lengths, as a tensor it is broadcast, or does not fit.
        attention_mask = attention_mask.clone()
    if attention_mask is not None:
        # A float mask is a bias.
        return Pattern(None if attention_mask.is_floating_point() else keep(attention_mask))
    # Nobody made a mask: the rules of Transformers' "sdpa", save that what does not say so is not
    # causal, as in "eager".
    target, source = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    if not causal:
        return Pattern(None)
    keys = source if target == 1 else target
    mask: Mask = Causal()
    if sliding_window is not None and sliding_window < keys:
        mask = SlidingWindow(sliding_window)
    return Pattern(mask, None if keys == source else keys)


def _bias(
    module: nn.Module,
    attention_mask: Tensor | None,
    position_bias: Tensor | TableBias | None,
    softcap: float | None,
    keys: int,
) -> Bias | None:
    """What is done to the scores, in the order in which models do it."""
    terms: list[Bias] = []
    if softcap is not None:
        terms.append(Softcap(softcap))
    if isinstance(position_bias, TableBias):
        if position_bias.value is not None:
            terms.append(position_bias.value)
    elif position_bias is not None and not has_no_bias(module):
        same = position_bias.shape[-1] == keys
        terms.append(Dense(position_bias if same else position_bias[..., :keys]))
    # Of a stand-in, which may be an argument of compiled code, the compiler knows its pattern only.
    own = None if isinstance(attention_mask, MaskStandIn) else attention_mask
    if own is not None and own.is_floating_point():
        terms.append(Dense(own))
    return functools.reduce(operator.add, terms) if terms else None
