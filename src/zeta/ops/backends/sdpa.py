"""torch's fused kernels, ``F.scaled_dot_product_attention``, where they compute the same function.

Masks and biases reach them as a tensor, which is made only while it is no larger than the query: a
decoding step or a short sequence, never ``T x S`` of a long one. As in torch, a NaN or inf in a key
or value that is hidden by such a tensor spreads.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from zeta.biases import Dense, summands
from zeta.masks import Causal, Mask, conjuncts
from zeta.masks import Dense as DenseMask
from zeta.ops.call import AttentionCall, without_autocast
from zeta.ops.offsets import is_by_offset
from zeta.transforms import (
    NO_FORWARD_MODE,
    is_exporting,
    is_forward_mode,
    needs_gradient,
)
from zeta.values import broadcast_shape, means

NAME = "sdpa"


def unsupported(call: AttentionCall) -> list[str]:
    """Why torch's fused kernels cannot do this call; empty if they can."""
    reasons = []
    if call.result != "output":
        reasons.append(f"it does not return {call.result}")
    if call.dropout_p:
        reasons.append("its dropout is not drawn from the counter-based hash")
    if is_forward_mode():
        reasons.append(NO_FORWARD_MODE)
    if call.value.shape[-1] != call.head_dim:
        reasons.append("it runs unfused where value and key differ in head_dim")
    if not call.scale > 0.0:
        # They scale what is hidden, -inf, and the largest score, too.
        reasons.append("its scale must be positive")
    if not call.query.stride(-1) == call.key.stride(-1) == call.value.stride(-1) == 1:
        reasons.append("it runs unfused where the last dimension is not contiguous")
    if call.query.device.type == "cuda":
        reasons += _unfused_on_cuda(call)
    if _plain_or_causal(call):
        return reasons
    return reasons + _unsupported_bias(call) + _unsupported_mask_tensor(call)


def run(call: AttentionCall) -> tuple[Tensor, None]:
    """Attention ``(B, H, T, Dv)``; no log-sum-exp."""
    plain = _plain_or_causal(call)
    causal, grouped = False, False
    # A branch settles the comparison of traced sizes, which by itself is no bool.
    if plain and call.mask is not None and call.target == call.source:
        causal = True
    if call.key_heads != call.heads:
        grouped = True
    with without_autocast(call.query.device):
        out = F.scaled_dot_product_attention(
            call.query,
            call.key,
            call.value,
            attn_mask=None if plain else _mask_tensor(call),
            is_causal=causal,
            scale=call.scale,
            enable_gqa=grouped,
        )
    return out, None


def _unfused_on_cuda(call: AttentionCall) -> list[str]:
    reasons = []
    if call.query.dtype == torch.float64:
        reasons.append("it runs unfused on CUDA in float64")
    elif call.query.dtype == torch.float32 and call.key_heads != call.heads:
        reasons.append("it runs unfused on CUDA with grouped heads in float32")
    if call.query.dtype == torch.float32 and call.head_dim % 4:
        reasons.append(
            "it runs unfused on CUDA in float32 where head_dim is no multiple of 4; got "
            f"{call.head_dim}"
        )
    if call.head_dim > 256:
        reasons.append(f"it runs unfused on CUDA with head_dim {call.head_dim}, above 256")
    return reasons


def _plain_or_causal(call: AttentionCall) -> bool:
    """Whether there is at most what torch's causal flag means, which aligns the first positions."""
    if call.bias is not None or call.has_positions:
        return False
    if call.mask is None:
        return True
    return means(call.mask, Causal) and (call.target == call.source or call.target == 1)


def _masks(call: AttentionCall) -> tuple[Mask, ...]:
    """The masks that hide something: a single query at the end is causal by itself."""
    last_query_alone = call.target == 1 and not call.has_positions
    terms = conjuncts(call.mask)
    return tuple(term for term in terms if not (last_query_alone and means(term, Causal)))


def _unsupported_bias(call: AttentionCall) -> list[str]:
    reasons = []
    for bias in summands(call.bias):
        if not (means(bias, Dense) or is_by_offset(bias)):
            reasons.append(f"it cannot apply the bias {type(bias).__name__}")
        elif torch.is_grad_enabled() and any(map(needs_gradient, bias.tensors())):
            reasons.append(f"it runs unfused where the bias {type(bias).__name__} needs a gradient")
    return reasons


def _unsupported_mask_tensor(call: AttentionCall) -> list[str]:
    if is_exporting():
        return [
            "the runtimes of exported programs do not agree on a row whose keys are all hidden by "
            "a mask tensor"
        ]
    if call.query.device.type == "cuda":
        return ["its CUDA kernels do not agree on a row whose keys are all hidden by a mask tensor"]
    values = (*_masks(call), *summands(call.bias))
    if len(values) == 1 and means(values[0], Dense, DenseMask):
        return []  # The user's own tensor: nothing is made.
    sizes = (call.batch, call.heads, call.target, call.source)
    shapes = [value.shape(*sizes) for value in values] + [(1, 1, 1, 1)]
    if call.has_positions:
        shapes.append((call.batch, 1, call.target, call.source))
    elements = math.prod(broadcast_shape(shapes))
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        # One graph for all sizes: what is not known of a traced size counts as large, and a size
        # in a text would bind the graph to it.
        if statically_known_true(call.target == 1 or elements <= call.query.numel()):
            return []
        return ["its mask and bias would be a tensor larger than the query"]
    if call.target > 1 and elements > call.query.numel():
        return [
            f"its mask and bias would be a tensor of {elements} elements, more than the "
            f"{call.query.numel()} of the query"
        ]
    return []


def _mask_tensor(call: AttentionCall) -> Tensor | None:
    """Masks and biases as torch takes them: bool, True where visible, or added to the scores."""
    tile = call.tile()
    visible = None if call.key_positions is None else tile.key_position >= 0
    for mask in _masks(call):
        term = mask.visible(tile)
        visible = term if visible is None else visible & term
    if call.bias is None:
        return visible
    first, *others = summands(call.bias)
    if means(first, Dense):
        added = first.values(tile).to(call.wide_dtype)  # Added to zeros it would be copied.
    else:
        added = first.apply(torch.zeros((), dtype=call.wide_dtype, device=call.query.device), tile)
    for bias in others:
        added = bias.apply(added, tile)
    return added if visible is None else torch.where(visible, added, float("-inf"))
