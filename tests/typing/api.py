"""A user's code, which mypy must accept as strictly as ours. Checked, never run."""

import argparse
from typing import assert_type

import torch
from torch import Tensor

import zeta
from zeta import biases, masks
from zeta.nn import (
    ALiBi,
    LinearScaling,
    MultiheadAttention,
    RelativePositionBias,
    RotaryEmbedding,
    XPos,
    YarnScaling,
)

q, k, v = torch.randn(3, 2, 4, 8, 16).unbind()
lengths = torch.tensor([8, 5])

assert_type(zeta.attention(q, k, v), Tensor)
assert_type(zeta.attention_with_lse(q, k, v, seed=3, dropout_p=0.1), tuple[Tensor, Tensor])
assert_type(zeta.attention_weights(q, k, reduce="mean"), Tensor)
assert_type(zeta.explain(q, k, v).backend, str)

mask: masks.Mask = masks.Causal() & masks.Padding(lengths) | masks.keep(torch.ones(8, 8) > 0)
bias: biases.Bias = biases.Softcap(50.0) + biases.Bucketed(torch.zeros(32, 4)) + biases.Alibi(v[0])
zeta.attention(q, k, v, mask=mask, bias=bias, backend="chunked")

for args in (None, {"multiway": True}, argparse.Namespace(xpos_rel_pos=True)):
    MultiheadAttention(args, 64, 4, 0.1, self_attention=True, subln=True)
module = MultiheadAttention(
    None,
    64,
    4,
    num_kv_heads=2,
    qk_norm="rms",
    position=RotaryEmbedding(16),
    need_weights="mean",
    dtype=torch.bfloat16,
)
for scaling in (LinearScaling(2.0), YarnScaling(8.0, original_max_position_embeddings=4096)):
    RotaryEmbedding(16, scaling=scaling)
MultiheadAttention(None, 64, 4, position=XPos(16), need_weights=False, window=128)
out, weights = module(q, k, v, rel_pos=RelativePositionBias(n_heads=4))
assert_type(weights, Tensor | None)
if isinstance(weights, zeta.LazyWeights):
    assert_type(weights.rows([0, -1]), Tensor)
    assert_type(weights.heads(slice(2)), Tensor)
    assert_type(weights.mean(0, keepdim=True), Tensor)
    assert_type(weights.entropy(), Tensor)
    assert_type(weights.materialized, bool)
    values, indices = weights.topk(3)
    total: Tensor = weights.detach().sum() + out.sum()
module(q, k, v, rel_pos=ALiBi(4), attn_mask=masks.SlidingWindow(4), incremental_state={})
