"""Attentions of packages that cannot be installed here, from what they are documented to do.

fairseq is sequence-first, scales queries, averages returned weights over heads, and keeps keys and
values a head at a time under the module in ``incremental_state``: after ``add_bias_kv`` has put its
key to those of the call, before ``add_zero_attn`` does; with ``static_kv`` those of the first call
stay. zetascale is TorchScale's module with every projection and norm multiway, and returns the
output alone. Each pretends to come from its package, as that is how a conversion recognises a
class.

Shapes: T target length, S source length, B batch, E embedding, H heads, D head dimension.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


def softmax(scores: Tensor) -> Tensor:
    return scores.float().softmax(-1).to(scores.dtype)


class MultiheadAttention(nn.Module):
    """fairseq's, with separate projections."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kdim: int | None = None,
        vdim: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        self_attention: bool = False,
        encoder_decoder_attention: bool = False,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
    ) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.kdim, self.vdim = kdim or embed_dim, vdim or embed_dim
        self.head_dim = embed_dim // num_heads
        self.dropout_module = nn.Dropout(dropout)
        self.self_attention = self_attention
        self.encoder_decoder_attention = encoder_decoder_attention
        self.k_proj = nn.Linear(self.kdim, embed_dim, bias=bias)
        self.v_proj = nn.Linear(self.vdim, embed_dim, bias=bias)
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.bias_k = nn.Parameter(torch.randn(1, 1, embed_dim)) if add_bias_kv else None
        self.bias_v = nn.Parameter(torch.randn(1, 1, embed_dim)) if add_bias_kv else None
        self.add_zero_attn = add_zero_attn
        self.beam_size = 1

    def heads(self, x_LBE: Tensor) -> Tensor:
        return x_LBE.unflatten(-1, (self.num_heads, self.head_dim)).permute(1, 2, 0, 3)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        incremental_state: dict[str, Any] | None = None,
        static_kv: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        value = key if self.encoder_decoder_attention else value
        assert self.encoder_decoder_attention or not static_kv
        q_BHTD = self.heads(self.q_proj(query) * self.head_dim**-0.5)
        key, value = self.k_proj(key), self.v_proj(value)
        extra = 0
        if self.bias_k is not None:
            key, value = (
                torch.cat((tokens, parameter.expand(1, tokens.shape[1], -1)))
                for tokens, parameter in ((key, self.bias_k), (value, self.bias_v))
            )
            extra += 1
        k_BHSD, v_BHSD = self.heads(key), self.heads(value)
        if incremental_state is not None:
            saved = incremental_state.setdefault("attn_state", {})
            if saved and static_kv:
                k_BHSD, v_BHSD = saved["prev_key"], saved["prev_value"]
            elif saved:
                k_BHSD = torch.cat((saved["prev_key"], k_BHSD), dim=2)
                v_BHSD = torch.cat((saved["prev_value"], v_BHSD), dim=2)
            saved.update(prev_key=k_BHSD, prev_value=v_BHSD)
        if self.add_zero_attn:
            k_BHSD, v_BHSD = (nn.functional.pad(x, (0, 0, 0, 1)) for x in (k_BHSD, v_BHSD))
            extra += 1
        scores = q_BHTD @ k_BHSD.mT
        if attn_mask is not None:
            scores = scores + nn.functional.pad(attn_mask, (0, extra))
        if key_padding_mask is not None:
            hidden = nn.functional.pad(key_padding_mask, (0, extra))
            scores = scores.masked_fill(hidden[:, None, None], float("-inf"))
        weights = softmax(scores)
        attended = (weights @ v_BHSD).permute(2, 0, 1, 3).flatten(2)
        return self.out_proj(attended), weights.mean(1)


FairseqAttention = MultiheadAttention
FairseqAttention.__module__ = "fairseq.modules.multihead_attention"


def zetascale(embed_dim: int, num_heads: int, **options: Any) -> nn.Module:
    """zetascale's attention, made of TorchScale's parts, with ``subln`` and ``xpos_rel_pos``."""
    from torchscale.component.multihead_attention import MultiheadAttention as TorchScaleAttention

    class MultiheadAttention(TorchScaleAttention):  # type: ignore[misc]  # an untyped base
        def forward(self, *arguments: Any, **named: Any) -> Any:
            return super().forward(*arguments, **named)[0]

    MultiheadAttention.__module__ = "zeta.nn.attention.multihead_attention"
    MultiheadAttention.__qualname__ = "MultiheadAttention"
    made: nn.Module = MultiheadAttention(
        torchscale_args(multiway=True, xpos_rel_pos=options.pop("xpos_rel_pos", False)),
        embed_dim, num_heads, self_attention=True, **options,
    )  # fmt: skip
    del made.args, made.encoder_decoder_attention
    return made


def torchscale_head(**options: Any) -> nn.Module:
    """TorchScale's attention as in its repository: weights are ``(B * H, T, S)``, ``is_causal`` is
    accepted."""
    from torchscale.component.multihead_attention import MultiheadAttention as TorchScaleAttention

    class MultiheadAttention(TorchScaleAttention):  # type: ignore[misc]  # an untyped base
        def forward(self, *arguments: Any, is_causal: bool = False, **named: Any) -> Any:
            out, weights_HBTS = super().forward(*arguments, **named)
            return out, weights_HBTS.transpose(0, 1).flatten(0, 1)

    MultiheadAttention.__module__ = "torchscale.component.multihead_attention"
    MultiheadAttention.__qualname__ = "MultiheadAttention"
    made: nn.Module = MultiheadAttention(
        torchscale_args(flash_attention=True), 16, 4, self_attention=True, **options
    )
    return made


def torchscale_args(**fields: Any) -> SimpleNamespace:
    """A configuration with all fields that TorchScale reads."""
    usual: dict[str, Any] = {
        "multiway": False,
        "layernorm_eps": 1e-5,
        "xpos_rel_pos": False,
        "xpos_scale_base": 512,
        "flash_attention": False,
    }
    return SimpleNamespace(**{**usual, **fields})
