"""From what a module has projected to an `AttentionCall`, and from that to attention weights.

Shapes: B batch, H heads, T target length, S source length, D head dimension.
"""

from typing import Literal, TypeAlias

from torch import Tensor

from zeta.biases import Bias
from zeta.caches import Cached, extend_padding
from zeta.masks import Mask
from zeta.nn.anchors import Blocks
from zeta.nn.extra_keys import ExtraKeys
from zeta.nn.masking import AttentionMask, RelativePosition, join, structured_mask
from zeta.ops.attention import run, run_weights, run_with_weights
from zeta.ops.call import AttentionCall
from zeta.ops.deferred import Compute
from zeta.ops.weights import lazy_weights

NeedWeights: TypeAlias = bool | Literal["lazy", "mean"]


def uncached(key_BGSD: Tensor, value_BGSD: Tensor, key_padding_mask: Tensor | None) -> Cached:
    """Keys and values of one call alone.

    Raises:
        ValueError: ``key_padding_mask`` is not ``(B, S)``.
        TypeError: It is neither bool nor floating point.
    """
    if key_padding_mask is not None:
        batch, _, source, _ = key_BGSD.shape
        key_padding_mask = extend_padding(
            None, key_padding_mask, batch=batch, length=source, added=source
        )
    return Cached(key_BGSD, value_BGSD, None, key_padding_mask)


def attention_call(
    query_BHTD: Tensor,
    cached: Cached,
    *,
    attn_mask: AttentionMask | None,
    rel_pos: RelativePosition | None,
    is_causal: bool,
    window: int | None,
    scale: float,
    dropout_p: float,
) -> AttentionCall:
    """Describe the attention of queries to all keys so far.

    Args:
        query_BHTD: Queries.
        cached: Keys and values, with their padding.
        attn_mask, rel_pos, is_causal: As `MultiheadAttention.forward` takes them.
        window, scale: As `MultiheadAttention` takes them.
        dropout_p: 0 except in training.

    Raises:
        ValueError: A mask or bias does not fit the queries and keys.
        TypeError: A mask or bias has the wrong type.
    """
    mask: Mask | None = None
    bias: Bias | None = None
    batch, heads, target, _ = query_BHTD.shape
    sizes = (batch, heads, target, cached.key.shape[2])
    if is_causal or window is not None:
        mask = structured_mask(is_causal, window, sizes, ordered=cached.positions is None)
    if cached.mask is not None:
        mask = cached.mask if mask is None else mask & cached.mask
    if attn_mask is not None or rel_pos is not None or cached.padding is not None:
        mask, bias = join(attn_mask, cached.padding, rel_pos, mask, sizes, query_BHTD.device)
    is_plain = mask is None and bias is None and not dropout_p and cached.positions is None
    if is_plain and _fit(query_BHTD, cached.key, cached.value):
        return AttentionCall(query_BHTD, cached.key, cached.value, scale=scale)
    query_positions = cached.query_positions
    if query_positions is not None:
        # The queries may be the last of the tokens that came.
        query_positions = query_positions[..., -target:]
    return AttentionCall.checked(
        query_BHTD,
        cached.key,
        cached.value,
        mask=mask,
        bias=bias,
        dropout_p=dropout_p,
        scale=scale,
        query_positions=query_positions,
        key_positions=cached.positions,
    )


def _fit(query_BHTD: Tensor, key_BGSD: Tensor, value_BGSD: Tensor) -> bool:
    """Whether `AttentionCall.checked` has nothing to refuse or to cast in a plain call, asked in
    less time. Layers of other libraries may return another dtype than the others do, and a cache
    may be of a time before the module was cast, or under autocast.
    """
    query, key = query_BHTD.shape, key_BGSD.shape
    return (
        query_BHTD.dtype == key_BGSD.dtype == value_BGSD.dtype
        and query_BHTD.device == key_BGSD.device == value_BGSD.device
        and len(key) == 4
        and key == value_BGSD.shape
        and key[0] == query[0]
        and key[3] == query[3]
        and key[1] > 0
        and query[1] % key[1] == 0
    )


def attend(
    call: AttentionCall, need_weights: NeedWeights, keys: Blocks | ExtraKeys | None
) -> tuple[Tensor, Tensor | None]:
    """The output ``(B, H, T, D)``; and weights, ``(H, B, T, S)``, ``(B, T, S)`` averaged over
    heads, or None, as ``need_weights`` says.

    Args:
        call: Of the tokens' keys.
        need_weights: As `MultiheadAttention.forward` takes it.
        keys: What runs the call, if not the op itself. Extra keys are further columns.
    """
    if keys is None and need_weights in (True, "mean"):
        out, weights = run_with_weights(call, mean=need_weights == "mean")
        return out, weights.transpose(0, 1) if need_weights is True else weights
    out = run(call)[0] if keys is None else keys.run(call)
    return out, _weights(call, need_weights, keys)


def _weights(
    call: AttentionCall, need_weights: NeedWeights, keys: Blocks | ExtraKeys | None
) -> Tensor | None:
    if need_weights is False:
        return None
    # Without the values, which lazy weights would keep alive.
    call = AttentionCall(
        call.query,
        call.key,
        call.key,
        mask=call.mask,
        bias=call.bias,
        scale=call.scale,
        query_positions=call.query_positions,
        key_positions=call.key_positions,
        result="mean_weights" if need_weights == "mean" else "weights",
    )
    compute: Compute = run_weights
    if isinstance(keys, ExtraKeys):
        call, compute = keys.weights(call)
    elif keys is not None:
        compute = keys.weights
    if need_weights == "lazy":
        return lazy_weights(call, compute, heads_first=True)
    weights = compute(call)
    return weights.transpose(0, 1) if need_weights is True else weights
