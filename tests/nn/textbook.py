"""`MultiheadAttention` once more, written out for one way and without a cache: what tests compare
with.

Shapes: B batch, H heads, G key heads, T target length, S source length, D head dimension.
"""

import torch
from torch import Tensor

from zeta.nn import MultiheadAttention


def attend(
    module: MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    visible: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output ``(B, T, E)`` and weights ``(H, B, T, S)`` of a module without rotation and norms.

    Args:
        module: Where the parameters come from.
        query: ``(B, T, E)``.
        key: ``(B, S, kdim)``.
        value: ``(B, S, vdim)``.
        visible: bool, broadcastable to ``(B, H, T, S)``.
        bias: Added to the scores, broadcastable to ``(B, H, T, S)``.
    """
    q_BHTD = heads(module.q_proj(query), module.head_dim)
    k_BGSD = heads(module.k_proj(key), module.head_dim)
    v_BGSD = heads(module.v_proj(value), module.head_dim)
    group = module.num_heads // module.num_kv_heads
    k_BHSD, v_BHSD = (t.repeat_interleave(group, dim=1) for t in (k_BGSD, v_BGSD))
    scores = q_BHTD @ k_BHSD.mT * module.scale
    if bias is not None:
        scores = scores + bias
    weights = softmax(scores, visible)
    out = (weights @ v_BHSD).transpose(1, 2).flatten(2)
    if module.inner_attn_ln is not None:
        out = module.inner_attn_ln(out)
    return module.out_proj(out), weights.transpose(0, 1)


def heads(x_BLF: Tensor, head_dim: int) -> Tensor:
    """``(B, L, heads * D)`` to ``(B, heads, L, D)``."""
    return x_BLF.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def softmax(scores: Tensor, visible: Tensor | None) -> Tensor:
    """Softmax over the visible keys; 0 where there are none."""
    if visible is None:
        return scores.softmax(-1)
    hidden = ~visible.expand_as(scores)
    return scores.masked_fill(hidden, float("-inf")).softmax(-1).masked_fill(hidden, 0.0)


def causal(target: int, source: int) -> Tensor:
    """``(T, S)`` bool: the queries are the last of the keys' positions, and see none after them."""
    return torch.ones(target, source, dtype=torch.bool).tril(source - target)
