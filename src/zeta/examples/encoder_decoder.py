"""A small encoder-decoder: bidirectional self-attention, causal self-attention, cross-attention.

Shapes: B batch, S source length, T target length, E embedding, H heads, V target vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn

from zeta.examples.feed_forward import FeedForward
from zeta.generation import generate
from zeta.nn import MultiheadAttention, RelativePositionBias

Caches = list[dict[str, dict[str, Any]]]


class EncoderBlock(nn.Module):
    """Attention over the whole source, then the feed-forward network.

    Args:
        embed_dim: Width of the residual stream.
        num_heads: Attention heads.
        dropout: Probability with which an attention weight is dropped in training.
    """

    def __init__(self, embed_dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(embed_dim)
        self.attention = MultiheadAttention(
            None, embed_dim, num_heads, dropout=dropout, self_attention=True, subln=True
        )
        self.feed_forward_norm = nn.LayerNorm(embed_dim)
        self.feed_forward = FeedForward(embed_dim)

    def forward(self, x_BSE: Tensor, padding_BS: Tensor, rel_pos: RelativePositionBias) -> Tensor:
        """A tensor of the input's shape; True in `padding_BS` is no token."""
        normed_BSE = self.attention_norm(x_BSE)
        attended_BSE, _ = self.attention(
            normed_BSE, normed_BSE, normed_BSE, key_padding_mask=padding_BS, rel_pos=rel_pos
        )
        x_BSE = x_BSE + attended_BSE
        out_BSE: Tensor = x_BSE + self.feed_forward(self.feed_forward_norm(x_BSE))
        return out_BSE


class DecoderBlock(nn.Module):
    """Attention over the words so far, then over the source, then the feed-forward network.

    Args:
        embed_dim: Width of the residual stream.
        num_heads: Attention heads.
        dropout: Probability with which an attention weight is dropped in training.
    """

    def __init__(self, embed_dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(embed_dim)
        self.attention = MultiheadAttention(
            None, embed_dim, num_heads, dropout=dropout, self_attention=True, subln=True
        )
        self.cross_attention_norm = nn.LayerNorm(embed_dim)
        self.cross_attention = MultiheadAttention(
            None, embed_dim, num_heads, dropout=dropout, encoder_decoder_attention=True
        )
        self.feed_forward_norm = nn.LayerNorm(embed_dim)
        self.feed_forward = FeedForward(embed_dim)

    def forward(
        self,
        x_BTE: Tensor,
        source_BSE: Tensor,
        padding_BS: Tensor,
        rel_pos: RelativePositionBias,
        cache: dict[str, dict[str, Any]] | None,
    ) -> tuple[Tensor, Tensor]:
        """A tensor of the input's shape, and the cross-attention's weights (H, B, T, S)."""
        normed_BTE = self.attention_norm(x_BTE)
        attended_BTE, _ = self.attention(
            normed_BTE,
            normed_BTE,
            normed_BTE,
            incremental_state=None if cache is None else cache["self"],
            rel_pos=rel_pos,
            is_causal=True,
        )
        x_BTE = x_BTE + attended_BTE
        attended_BTE, weights_HBTS = self.cross_attention(
            self.cross_attention_norm(x_BTE),
            source_BSE,
            source_BSE,
            incremental_state=None if cache is None else cache["cross"],
            key_padding_mask=padding_BS,
        )
        # Computed when they are looked at, which costs a training nothing; None if not asked for.
        assert weights_HBTS is not None
        x_BTE = x_BTE + attended_BTE
        out_BTE: Tensor = x_BTE + self.feed_forward(self.feed_forward_norm(x_BTE))
        return out_BTE, weights_HBTS


class EncoderDecoder(nn.Module):
    """Reads a source sequence and writes a target sequence.

    Args:
        source_vocabulary: Number of source ids; id 0 is padding.
        target_vocabulary: Number of target ids; id 0 is padding.
        embed_dim: Width of the residual stream.
        num_heads: Attention heads of each layer.
        num_layers: Layers of the encoder, and of the decoder.
        dropout: Probability with which an attention weight is dropped in training.
    """

    def __init__(
        self,
        source_vocabulary: int,
        target_vocabulary: int,
        *,
        embed_dim: int = 128,
        num_heads: int = 4,
        num_layers: int = 2,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.source_embedding = nn.Embedding(source_vocabulary, embed_dim)
        self.target_embedding = nn.Embedding(target_vocabulary, embed_dim)
        self.source_rel_pos = RelativePositionBias(bidirectional=True, n_heads=num_heads)
        self.target_rel_pos = RelativePositionBias(bidirectional=False, n_heads=num_heads)
        self.encoder = nn.ModuleList(
            EncoderBlock(embed_dim, num_heads, dropout) for _ in range(num_layers)
        )
        self.source_norm = nn.LayerNorm(embed_dim)
        self.decoder = nn.ModuleList(
            DecoderBlock(embed_dim, num_heads, dropout) for _ in range(num_layers)
        )
        self.target_norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, target_vocabulary)

    def encode(self, source_BS: Tensor) -> tuple[Tensor, Tensor]:
        """The encoded source (B, S, E) and where it is padding (B, S)."""
        padding_BS = source_BS == 0
        x_BSE = self.source_embedding(source_BS)
        for block in self.encoder:
            x_BSE = block(x_BSE, padding_BS, self.source_rel_pos)
        return self.source_norm(x_BSE), padding_BS

    def decode(
        self,
        target_BT: Tensor,
        source_BSE: Tensor,
        padding_BS: Tensor,
        caches: Caches | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Score the id after each position of the target.

        Args:
            target_BT: int64 ids; with `caches`, only those that they have not seen.
            source_BSE: What `encode` returned.
            padding_BS: Where the source is padding.
            caches: As `empty_caches` makes them; the layers keep their keys and values there.

        Returns:
            Logits ``(B, T, V)``, and each layer's cross-attention weights ``(H, B, T, S)``.
        """
        x_BTE = self.target_embedding(target_BT)
        weights = []
        for layer, block in enumerate(self.decoder):
            cache = None if caches is None else caches[layer]
            x_BTE, weights_HBTS = block(x_BTE, source_BSE, padding_BS, self.target_rel_pos, cache)
            weights.append(weights_HBTS)
        return self.head(self.target_norm(x_BTE)), weights

    def forward(self, source_BS: Tensor, target_BT: Tensor) -> Tensor:
        """Logits (B, T, V) of the id after each of `target_BT`."""
        return self.decode(target_BT, *self.encode(source_BS))[0]

    def empty_caches(self) -> Caches:
        """Two empty dicts a layer, for its two attentions: what decoding starts from."""
        return [{"self": {}, "cross": {}} for _ in self.decoder]

    @torch.no_grad()
    def write(self, source_BS: Tensor, start: int, max_length: int) -> Tensor:
        """Write the likeliest ids one by one, with caches.

        Args:
            source_BS: int64 ids, 0 for padding.
            start: The id that every target begins with.
            max_length: How many ids to write.

        Returns:
            int64 ids (B, max_length), without the start; what comes after an end id means nothing.
        """
        source_BSE, padding_BS = self.encode(source_BS)
        caches = self.empty_caches()

        def score(ids_BT: Tensor, _caches: object, _positions: Tensor) -> Tensor:
            return self.decode(ids_BT, source_BSE, padding_BS, caches)[0]

        first_B1 = source_BS.new_full((len(source_BS), 1), start)
        return generate(score, first_B1, [], max_new_tokens=max_length).tokens
