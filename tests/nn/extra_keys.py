"""Modules with extra keys, and a textbook that joins these to the tokens' in one softmax.

Shapes: B batch, H heads, G key heads, T target length, S source length, X extra keys, E embedding,
D head dimension.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tests.nn import textbook
from zeta.nn import MultiheadAttention

B, H, T, S, E = 2, 4, 5, 7, 16
EXACT = {"rtol": 0.0, "atol": 1e-12}
EXTRAS = {
    "learned": {"add_bias_kv": True},
    "zeros": {"add_zero_attn": True},
    "both": {"add_bias_kv": True, "add_zero_attn": True},
}
BOTH = EXTRAS["both"]
PADDING = torch.arange(S) >= torch.tensor([[S], [3]])


def make(**options: Any) -> MultiheadAttention:
    """A float64 module in evaluation mode, every parameter random."""
    args, dtype = options.pop("args", None), options.pop("dtype", torch.float64)
    module = MultiheadAttention(args, E, H, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.4)
    return module.to(dtype).eval()


def tokens(length: int, features: int = E, **options: Any) -> Tensor:
    return torch.randn(B, length, features, **{"dtype": torch.float64, **options})


def attend(
    module: MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    visible: Tensor | None = None,
    bias: Tensor | None = None,
    cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Output ``(B, T, E)`` and weights ``(H, B, T, S + X)``, all keys in one softmax."""
    q_BHTD = textbook.heads(module.q_proj(query), module.head_dim)
    k_BGSD = textbook.heads(module.k_proj(key), module.head_dim)
    v_BGSD = textbook.heads(module.v_proj(value), module.head_dim)
    if module.q_norm is not None and module.k_norm is not None:
        q_BHTD, k_BGSD = module.q_norm(q_BHTD), module.k_norm(k_BGSD)
    turned_BHTD = q_BHTD
    if module.xpos is not None:
        turned_BHTD, k_BGSD = module.xpos.queries(q_BHTD, 0), module.xpos.keys(k_BGSD, 0)
    group = module.num_heads // module.num_kv_heads
    k_BHSD, v_BHSD = (t.repeat_interleave(group, dim=1) for t in (k_BGSD, v_BGSD))
    scores = turned_BHTD @ k_BHSD.mT * module.scale
    if bias is not None:
        scores = scores + bias
    for parameter, zeros in ((module.bias_k, False), (None, module.add_zero_attn)):
        if parameter is not None or zeros:
            extra_HD = torch.zeros(module.num_heads, module.head_dim, dtype=query.dtype)
            if parameter is not None:
                extra_HD = parameter.view(-1, module.head_dim).repeat_interleave(group, 0)
            score = (q_BHTD @ extra_HD[..., None]) * module.scale
            scores = torch.cat((scores, score), -1)
    if cap is not None:
        scores = cap * (scores / cap).tanh()
    if module.bias_v is not None:
        extra_HD = module.bias_v.view(-1, module.head_dim).repeat_interleave(group, 0)
        v_BHSD = torch.cat((v_BHSD, extra_HD[:, None].expand(query.shape[0], -1, 1, -1)), 2)
    v_BHSD = pad(v_BHSD, (0, 0, 0, scores.shape[-1] - v_BHSD.shape[2]))
    if visible is not None:
        columns = scores.shape[-1] - visible.shape[-1]
        scores = scores.masked_fill(~pad(visible, (0, columns), value=True), float("-inf"))
    weights = scores.softmax(-1)
    out = (weights @ v_BHSD).transpose(1, 2).flatten(2)
    if module.inner_attn_ln is not None:
        out = module.inner_attn_ln(out)
    return module.out_proj(out), weights.transpose(0, 1)


def check_same(
    found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], leaves: list[Tensor]
) -> None:
    """Outputs and weights are equal, and so are the gradients of both together."""
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.as_tensor(ours), theirs, **EXACT)
    cotangents = [torch.randn_like(t) for t in expected]
    gradients = [torch.autograd.grad(outputs, leaves, cotangents) for outputs in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        assert theirs.isfinite().all()
        torch.testing.assert_close(ours, theirs, **EXACT)
