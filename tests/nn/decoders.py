"""Attentions that decode with a plain dict, and their tokens."""

from typing import Any

import torch
from torch import Tensor

from zeta.nn import MultiheadAttention, RotaryEmbedding

H, E, T = 4, 16, 9
EXACT = {"rtol": 0.0, "atol": 1e-10}


def make(**options: Any) -> MultiheadAttention:
    args = options.pop("args", None)
    return MultiheadAttention(args, E, H, dtype=torch.float64, **options).eval()


def decoder(**options: Any) -> MultiheadAttention:
    return make(self_attention=True, **options)


def tokens(length: int = T, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, E, dtype=torch.float64)


def decode(module: MultiheadAttention, x: Tensor, sizes: list[int], **options: Any) -> Tensor:
    """Outputs of chunks of these sizes, one after the other."""
    state: dict[str, Any] = {}
    outs = [module(p, p, p, state, is_causal=True, **options)[0] for p in x.split(sizes, dim=1)]
    return torch.cat(outs, 1)


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped heads": {"num_kv_heads": 2},
    "sub-LN": {"subln": True},
    "xPos": {"args": {"xpos_rel_pos": True, "xpos_scale_base": 16}},
    "rotary": {"position": RotaryEmbedding(4)},
    "window": {"window": 3},
    "window and xPos": {"window": 4, "args": {"xpos_rel_pos": True}},
    "norms": {"qk_norm": "rms", "position": RotaryEmbedding(4)},
    "multiway": {"args": {"multiway": True}},
}


def cross(**options: Any) -> MultiheadAttention:
    return make(encoder_decoder_attention=True, **options)
