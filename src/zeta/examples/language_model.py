"""A small causal language model over bytes: sub-LN blocks, T5 relative positions, dropout.

Shapes: B batch, T length, E embedding, V vocabulary (the 256 byte values).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zeta.caches import DecodingCache, DynamicCache
from zeta.examples.feed_forward import FeedForward
from zeta.generation import Sampling, generate
from zeta.nn import MultiheadAttention, RelativePositionBias

VOCABULARY = 256
Cache = dict[str, Any] | DecodingCache


class Block(nn.Module):
    """One layer: attention over the bytes so far, then the feed-forward network.

    Args:
        embed_dim: Width of the residual stream.
        num_heads: Attention heads.
        dropout: Probability with which an attention weight is dropped in training.
        attention: What builds the attention, called like `zeta.nn.MultiheadAttention`.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, dropout: float, attention: Callable[..., nn.Module]
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(embed_dim)
        self.attention = attention(
            None, embed_dim, num_heads, dropout=dropout, self_attention=True, subln=True
        )
        self.feed_forward_norm = nn.LayerNorm(embed_dim)
        self.feed_forward = FeedForward(embed_dim)

    def forward(
        self, x_BTE: Tensor, rel_pos: RelativePositionBias | Tensor, cache: Cache | None
    ) -> Tensor:
        """A tensor of the input's shape; `cache` remembers the keys and values seen."""
        normed_BTE = self.attention_norm(x_BTE)
        attended_BTE, _ = self.attention(
            normed_BTE,
            normed_BTE,
            normed_BTE,
            incremental_state=cache,
            rel_pos=rel_pos,
            is_causal=True,
        )
        x_BTE = x_BTE + attended_BTE
        hidden: Tensor = x_BTE + self.feed_forward(self.feed_forward_norm(x_BTE))
        return hidden


class LanguageModel(nn.Module):
    """Predicts the next byte from the bytes before it.

    There are no position embeddings: one relative position bias, shared by all layers, says how far
    apart two bytes are, so a text may be longer than those of the training.

    Args:
        embed_dim: Width of the residual stream.
        num_heads: Attention heads of each layer.
        num_layers: Layers.
        dropout: Probability with which an attention weight is dropped in training.
        attention: What builds each layer's attention.
    """

    def __init__(
        self,
        *,
        embed_dim: int = 128,
        num_heads: int = 4,
        num_layers: int = 4,
        dropout: float = 0.1,
        attention: Callable[..., nn.Module] = MultiheadAttention,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, embed_dim)
        self.rel_pos = RelativePositionBias(bidirectional=False, n_heads=num_heads)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, dropout, attention) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, VOCABULARY, bias=False)
        # At first every byte is equally likely: 8 bits.
        nn.init.zeros_(self.head.weight)

    def forward(
        self,
        bytes_BT: Tensor,
        caches: Sequence[Cache] | None = None,
        rel_pos: Tensor | None = None,
    ) -> Tensor:
        """Score the byte after each position.

        Args:
            bytes_BT: int64, the text; with `caches`, only the bytes that they have not seen.
            caches: One a layer, empty at first; the layers keep their keys and values there.
            rel_pos: The relative position bias as a tensor ``(H, T, T)``, for an attention that
                cannot take the module.

        Returns:
            Logits ``(B, T, V)``.
        """
        x_BTE = self.embedding(bytes_BT)
        for layer, block in enumerate(self.blocks):
            x_BTE = block(
                x_BTE,
                self.rel_pos if rel_pos is None else rel_pos,
                None if caches is None else caches[layer],
            )
        logits_BTV: Tensor = self.head(self.norm(x_BTE))
        return logits_BTV

    def empty_caches(self) -> list[dict[str, Any]]:
        """One empty dict a layer: what decoding starts from."""
        return [{} for _ in self.blocks]


def continue_text(
    model: LanguageModel,
    prompt: bytes,
    count: int,
    *,
    seed: int = 0,
    temperature: float = 0.6,
    use_cache: bool = True,
) -> tuple[bytes, Tensor]:
    """Continue a text byte by byte.

    Args:
        model: In evaluation mode.
        prompt: The text to continue, at least one byte.
        count: Bytes to write.
        seed: Of the draws.
        temperature: Divides the logits; towards 0 the likeliest byte wins.
        use_cache: Feed the model the new byte alone, with its caches; else the whole text each
            time.

    Returns:
        The bytes, and the logits ``(count, V)`` that they were drawn from.
    """
    read = torch.empty(1, 0, dtype=torch.int64)
    logits: list[Tensor] = []

    def score(bytes_1N: Tensor, caches: Sequence[DecodingCache], _: Tensor) -> Tensor:
        nonlocal read
        read = torch.cat((read, bytes_1N), dim=1)
        scored: Tensor = model(bytes_1N, caches) if use_cache else model(read)
        logits.append(scored[0, -1])
        return scored[:, -bytes_1N.shape[1] :]

    found = generate(
        score,
        torch.tensor([list(prompt)]),
        [DynamicCache() for _ in model.blocks] if use_cache else [],
        max_new_tokens=count,
        choose=Sampling(temperature=temperature, seed=seed),
    )
    return bytes(found.tokens[0].tolist()), torch.stack(logits)


def window_loss(
    model: LanguageModel, text_N: Tensor, generator: torch.Generator, batch: int, length: int
) -> Tensor:
    """Mean cross entropy, in nats, of the model on windows drawn from a text.

    Args:
        model: What predicts.
        text_N: int64 bytes.
        generator: Draws where the windows start.
        batch: Number of windows.
        length: Bytes that are predicted in each.

    Returns:
        A scalar to go backward from.
    """
    start_B = torch.randint(len(text_N) - length, (batch,), generator=generator)
    window_BT = text_N[start_B[:, None] + torch.arange(length + 1)]
    logits_BTV = model(window_BT[:, :-1])
    return F.cross_entropy(logits_BTV.flatten(0, 1), window_BT[:, 1:].flatten())


@torch.no_grad()
def bits_per_byte(model: LanguageModel, text: bytes, length: int) -> float:
    """Mean bits that the model spends on a byte of a text.

    It reads windows that overlap by half, and only the second half of each counts, so that a byte
    is predicted once, from at least ``length / 2`` bytes before it wherever there are as many. The
    first byte, before which there is none, costs 8 bits.

    Args:
        model: In evaluation mode.
        text: At least two bytes.
        length: Bytes in a window, even.

    Returns:
        Bits per byte.
    """
    half = length // 2
    text_N = torch.tensor(list(text))
    bits = 8.0
    for start in range(1, len(text), half):
        first = max(0, start - 1 - half)
        target_T = text_N[start : start + half]
        logits_TV = model(text_N[None, first : start - 1 + len(target_T)])[0, -len(target_T) :]
        bits += F.cross_entropy(logits_TV, target_T, reduction="sum").item() / math.log(2)
    return bits / len(text)
