"""Modules: `MultiheadAttention`, and what it is built from and given."""

from zeta.nn.attention import MultiheadAttention
from zeta.nn.biases import ALiBi, RelativePositionBias
from zeta.nn.config import AttentionConfig
from zeta.nn.multiway import (
    MultiwayEmbedding,
    MultiwayNetwork,
    MultiwayWrapper,
    set_split_position,
)
from zeta.nn.positions import XPOS, RotaryEmbedding, XPos
from zeta.nn.scalings import LinearScaling, Llama3Scaling, YarnScaling

__all__ = [
    "XPOS",
    "ALiBi",
    "AttentionConfig",
    "LinearScaling",
    "Llama3Scaling",
    "MultiheadAttention",
    "MultiwayEmbedding",
    "MultiwayNetwork",
    "MultiwayWrapper",
    "RelativePositionBias",
    "RotaryEmbedding",
    "XPos",
    "YarnScaling",
    "set_split_position",
]
