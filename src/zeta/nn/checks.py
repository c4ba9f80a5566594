"""What `MultiheadAttention` refuses, with the argument, what was expected and what came.

Shapes: B batch, H heads, T target length, S source length, E embedding, D head dimension.
"""

from torch import Tensor, nn

from zeta.caches import Cached
from zeta.caches.dictionary import KEY, VALUE, check_fits
from zeta.nn.positions import Rotation, XPos
from zeta.values import (
    check_finite,
    check_flag,
    check_integer,
    check_probability,
    check_size,
    check_tensor,
)


def check_sizes(
    embed_dim: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int | None,
    kdim: int | None,
    vdim: int | None,
) -> None:
    """Raise unless all are sizes, or None, and the heads divide what they share."""
    check_size("embed_dim", embed_dim)
    check_size("num_heads", num_heads)
    check_size("num_kv_heads", num_kv_heads)
    for name, size in (("head_dim", head_dim), ("kdim", kdim), ("vdim", vdim)):
        if size is not None:
            check_size(name, size)
    if head_dim is None and embed_dim % num_heads:
        raise ValueError(
            "embed_dim must be a multiple of num_heads, or head_dim be given; "
            f"got {embed_dim} and {num_heads}"
        )
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads must be a multiple of num_kv_heads; got {num_heads} and {num_kv_heads}"
        )


def check_numbers(dropout: float, scale: float | None) -> None:
    """Raise TypeError unless they are numbers, ValueError unless the first is a probability and the
    second finite.
    """
    check_probability("dropout", dropout)
    if scale is not None:
        check_finite("scale", scale)


def check_flags(**flags: object) -> None:
    """`zeta.values.check_flag` of each."""
    for name, flag in flags.items():
        check_flag(name, flag)


def check_kind(
    self_attention: bool,
    encoder_decoder_attention: bool,
    subln: bool,
    window: int | None,
    need_weights: object,
) -> None:
    """Raise for a feature that this kind of attention does not have, or that there is not."""
    check_flags(
        self_attention=self_attention,
        encoder_decoder_attention=encoder_decoder_attention,
        subln=subln,
    )
    if self_attention and encoder_decoder_attention:
        raise ValueError(
            "at most one of self_attention and encoder_decoder_attention can be True; got both"
        )
    if subln and not self_attention:
        raise ValueError(
            "subln=True needs self_attention=True: sub-LayerNorm is for self-attention"
        )
    if window is not None:
        check_integer("window", window)
        if encoder_decoder_attention:
            raise ValueError(
                "window needs queries and keys of one sequence, not encoder_decoder_attention"
            )
        if window < 1:
            raise ValueError(f"window must be at least 1, the token itself; got {window}")
    check_need_weights(need_weights)


def check_need_weights(need_weights: object) -> None:
    """Raise TypeError unless it is a bool or a string, ValueError for a string of another kind."""
    # Whether it is True is asked by `is`, and what only equals True is not.
    if isinstance(need_weights, bool):
        return
    is_string = isinstance(need_weights, str)
    if not is_string or need_weights not in ("lazy", "mean"):
        raise (ValueError if is_string else TypeError)(
            f"need_weights must be 'lazy', True, False or 'mean'; got {need_weights!r:.80}"
        )


def check_options(need_weights: object, is_causal: object) -> None:
    """As `check_need_weights` and `zeta.values.check_flag`: what a call may choose."""
    check_need_weights(need_weights)
    if not isinstance(is_causal, bool):
        check_flag("is_causal", is_causal)


def check_position(
    position: Rotation | None,
    xpos_rel_pos: bool,
    head_dim: int,
    self_attention: bool,
    encoder_decoder_attention: bool,
) -> None:
    """Raise unless the rotation fits the heads, and this kind of attention has rotations."""
    if xpos_rel_pos and not (self_attention or encoder_decoder_attention):
        raise ValueError(
            "args.xpos_rel_pos=True needs self_attention=True: xPos is for self-attention"
        )
    if position is None:
        return
    if not isinstance(position, Rotation):
        raise TypeError(
            f"position must be a RotaryEmbedding or an XPos; got {type(position).__name__}"
        )
    if xpos_rel_pos:
        raise ValueError(
            "position was given, and args.xpos_rel_pos=True is another one; give only one"
        )
    if encoder_decoder_attention or (isinstance(position, XPos) and not self_attention):
        raise ValueError(
            f"position={type(position).__name__} needs self_attention=True: "
            "queries and keys of one sequence"
        )
    if position.head_dim != head_dim:
        raise ValueError(f"position must have head_dim={head_dim}; got {position.head_dim}")


def check_tensors(
    query: Tensor, key: Tensor | None, value: Tensor | None, key_padding_mask: Tensor | None
) -> None:
    """Raise TypeError unless the query is a tensor, and each of the others one or None."""
    check_tensor("query", query)
    # Mostly it is the same tensor, and most calls are short.
    if key is not query and key is not None:
        check_tensor("key", key)
    if value is not key and value is not None:
        check_tensor("value", value)
    if key_padding_mask is not None:
        check_tensor("key_padding_mask", key_padding_mask)


def check_query(query: Tensor, embed_dim: int) -> None:
    """Raise ValueError unless the query is ``(B, T, E)``, not empty."""
    shape = query.shape
    if len(shape) != 3 or shape[2] != embed_dim:
        raise ValueError(
            f"query must have shape (batch, length, {embed_dim}) or (length, {embed_dim}); "
            f"got {tuple(shape)}"
        )
    if shape[0] == 0 or shape[1] == 0:
        raise ValueError(f"query must not be empty; got {tuple(shape)}")


def check_projected(name: str, x: Tensor, projection: nn.Module) -> None:
    """Raise for an input that its projection has refused because of its dtype or its device.

    Not asked beforehand: autocast and layers of other libraries take more than their own dtype.

    Raises:
        TypeError: It has another dtype than the parameters.
        ValueError: It is on another device.
    """
    parameter = next(projection.parameters(), None)
    if parameter is None:
        return
    if x.device != parameter.device:
        raise ValueError(
            f"{name} must be on the parameters' device {parameter.device}; got {x.device}"
        )
    if x.dtype != parameter.dtype and parameter.is_floating_point():
        raise TypeError(f"{name} must have the parameters' dtype {parameter.dtype}; got {x.dtype}")


def checked_source(
    batch: int, key: Tensor | None, value: Tensor | None, kdim: int, vdim: int
) -> tuple[Tensor, Tensor]:
    """Key and value; ValueError unless ``(B, S, kdim)`` and ``(B, S, vdim)``, not empty."""
    if key is None or value is None:
        raise ValueError(
            "key and value must be given, unless incremental_state has an encoder's keys"
        )
    k, v = key.shape, value.shape
    if len(k) != 3 or k[2] != kdim:
        raise ValueError(f"key must have shape (batch, length, {kdim}); got {tuple(k)}")
    if len(v) != 3 or v[2] != vdim:
        raise ValueError(f"value must have shape (batch, length, {vdim}); got {tuple(v)}")
    if k[0] != batch or v[0] != batch:
        raise ValueError(
            f"query, key and value must have one batch size; got {batch}, {k[0]} and {v[0]}"
        )
    if k[1] != v[1]:
        raise ValueError(f"key and value must have the same length; got {k[1]} and {v[1]}")
    if k[1] == 0:
        raise ValueError(f"key must not be empty; got {tuple(k)}")
    return key, value


def check_reused(cached: Cached, query_BHTD: Tensor, num_kv_heads: int) -> None:
    """Raise ValueError unless keys and values that a cross-attention kept are such as it projects.

    It may have another dtype since, or they may be another one's.
    """
    like = query_BHTD[:, :num_kv_heads]
    check_fits(KEY, cached.key, like)
    check_fits(VALUE, cached.value, like)
