"""Attention as textbooks write it, in plain torch: every score is held in memory.

What `zeta demo` compares with. It takes the arguments, has the parameters and returns the results
of `zeta.nn.MultiheadAttention`, as far as the language model needs them.

Shapes: B batch, H heads, T length, E embedding, D head dimension.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TextbookAttention(nn.Module):
    """Self-attention that holds its ``(B, H, T, T)`` scores.

    Args:
        args: Not used; here as in `zeta.nn.MultiheadAttention`.
        embed_dim: Features of the tokens.
        num_heads: Heads.
        dropout: Probability with which a weight is dropped in training.
        self_attention: Must be True.
        subln: Must be True: LayerNorm before the output projection.
    """

    def __init__(
        self,
        args: None,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        self_attention: bool = True,
        subln: bool = True,
    ) -> None:
        super().__init__()
        if not (self_attention and subln):
            raise ValueError("the textbook is written for self-attention with subln alone")
        self.num_heads = num_heads
        self.dropout = dropout
        self.q_proj = nn.Linear(embed_dim, embed_dim)
        self.k_proj = nn.Linear(embed_dim, embed_dim)
        self.v_proj = nn.Linear(embed_dim, embed_dim)
        self.out_proj = nn.Linear(embed_dim, embed_dim)
        self.inner_attn_ln = nn.LayerNorm(embed_dim)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        incremental_state: dict[str, Any] | None = None,
        rel_pos: Tensor | None = None,
        is_causal: bool = True,
    ) -> tuple[Tensor, None]:
        """Attend.

        Args:
            query: ``(B, T, E)``.
            key: ``(B, T, E)``.
            value: ``(B, T, E)``.
            incremental_state: Must be None: this attention does not decode.
            rel_pos: Added to the scores, ``(H, T, T)``.
            is_causal: Hide from a query the keys after it.

        Returns:
            ``(B, T, E)``, and no weights.
        """
        if incremental_state is not None:
            raise ValueError("the textbook has no cache; got an incremental_state")
        query_BHTD, key_BHTD, value_BHTD = (
            projection(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection, x in (
                (self.q_proj, query),
                (self.k_proj, key),
                (self.v_proj, value),
            )
        )
        scores_BHTT = query_BHTD @ key_BHTD.transpose(-1, -2) / math.sqrt(query_BHTD.shape[-1])
        if rel_pos is not None:
            scores_BHTT = scores_BHTT + rel_pos
        if is_causal:
            length = query.shape[1]
            after_TT = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
            scores_BHTT = scores_BHTT.masked_fill(after_TT, -math.inf)
        weights_BHTT = F.dropout(torch.softmax(scores_BHTT, dim=-1), self.dropout, self.training)
        out_BTE = (weights_BHTT @ value_BHTD).transpose(1, 2).flatten(2)
        return self.out_proj(self.inner_attn_ln(out_BTE)), None
