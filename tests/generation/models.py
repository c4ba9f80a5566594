"""A small model with everything that a cache must get right, and the plainest decoding of it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zeta.caches import DecodingCache, DynamicCache
from zeta.nn import MultiheadAttention, RelativePositionBias

VOCABULARY = 7


class Toy(nn.Module):
    """Two attentions, with xPos, a relative position bias and grouped heads, in float64."""

    def __init__(self, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 16)
        self.rel_pos = RelativePositionBias(
            bidirectional=False, num_buckets=8, max_distance=16, n_heads=4
        )
        config = {"xpos_rel_pos": True, "xpos_scale_base": 16}
        self.layers = nn.ModuleList(
            MultiheadAttention(config, 16, 4, self_attention=True, num_kv_heads=2) for _ in range(2)
        )
        self.head = nn.Linear(16, vocabulary)
        self.double().eval()
        self.calls: list[tuple[int, int]] = []
        with torch.no_grad():
            self.head.weight.mul_(4)

    def forward(
        self, tokens: Tensor, caches: Sequence[DecodingCache | None], positions: Tensor
    ) -> Tensor:
        self.calls.append((tokens.shape[0], tokens.shape[1]))
        x = self.embedding(tokens)
        for layer, cache in zip(self.layers, caches, strict=True):
            out, _ = layer(
                x,
                x,
                x,
                cache,
                key_padding_mask=positions < 0,
                rel_pos=self.rel_pos,
                is_causal=True,
                need_weights=False,
                positions=positions,
            )
            x = x + out
        return self.head(x)

    def caches(self) -> list[DynamicCache]:
        return [DynamicCache() for _ in self.layers]

    @torch.no_grad()
    def logits_after(self, tokens: Sequence[int]) -> Tensor:
        """``(V,)``, from the whole sequence, without a cache."""
        whole = torch.tensor([list(tokens)])
        return self(whole, [None, None], torch.arange(len(tokens))[None])[0, -1]
