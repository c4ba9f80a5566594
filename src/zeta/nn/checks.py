"""What `MultiheadAttention` refuses, with the argument, what was expected and what came.

Shapes: B batch, T target length, S source length, E embedding.
"""

from torch import Tensor

from zeta.nn.positions import Rotation, XPos

WEIGHTS = ("lazy", True, False, "mean")


def check_tensor(name: str, value: object) -> None:
    """Raise TypeError unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(value).__name__}")


def check_sizes(
    embed_dim: int, num_heads: int, num_kv_heads: int, head_dim: int | None, dropout: float
) -> None:
    """Raise ValueError unless the heads divide what they share and dropout is below 1."""
    for name, size in (
        ("embed_dim", embed_dim),
        ("num_heads", num_heads),
        ("num_kv_heads", num_kv_heads),
    ):
        if size < 1:
            raise ValueError(f"{name} must be positive; got {size}")
    if head_dim is None and embed_dim % num_heads:
        raise ValueError(
            "embed_dim must be a multiple of num_heads, or head_dim be given; "
            f"got {embed_dim} and {num_heads}"
        )
    if head_dim is not None and head_dim < 1:
        raise ValueError(f"head_dim must be positive; got {head_dim}")
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads must be a multiple of num_kv_heads; got {num_heads} and {num_kv_heads}"
        )
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1); got {dropout}")


def check_kind(
    self_attention: bool,
    encoder_decoder_attention: bool,
    subln: bool,
    window: int | None,
    need_weights: object,
) -> None:
    """Raise ValueError for a feature that this kind of attention does not have."""
    if self_attention and encoder_decoder_attention:
        raise ValueError(
            "at most one of self_attention and encoder_decoder_attention can be True; got both"
        )
    if subln and not self_attention:
        raise ValueError(
            "subln=True needs self_attention=True: sub-LayerNorm is for self-attention"
        )
    if window is not None and encoder_decoder_attention:
        raise ValueError(
            "window needs queries and keys of one sequence, not encoder_decoder_attention"
        )
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, the token itself; got {window}")
    check_need_weights(need_weights)


def check_need_weights(need_weights: object) -> None:
    """Raise ValueError unless it is one of the four that are known."""
    if need_weights not in WEIGHTS:
        raise ValueError(
            f"need_weights must be 'lazy', True, False or 'mean'; got {need_weights!r}"
        )


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
