"""What a model is to a generation, and how it reads the prompt.

Shapes: B sequences, T prompt length, N tokens of a call, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from zeta.caches import DecodingCache, RollingCache
from zeta.generation.bars import with_bar
from zeta.generation.checks import check_caches, check_int, check_logits
from zeta.values import check_tensor


class Model(Protocol):
    """A model of the next token: any callable."""

    def __call__(
        self, tokens: Tensor, caches: Sequence[DecodingCache], positions: Tensor, /
    ) -> Tensor:
        """Score the token after each of ``tokens``.

        Args:
            tokens: ``(B, N)`` int64, those that follow what the caches have.
            caches: One for each attention, to be given to it as its ``incremental_state``.
            positions: ``(B, N)`` int64, the place of each token in its own sequence; -1 for
                padding. So ``positions < 0`` is the ``key_padding_mask``, and what a rotation
                takes as its positions.

        Returns:
            Logits, ``(B, N, V)``.
        """
        ...


class Prompt:
    """Prompts of different lengths, aligned at their last tokens.

    Args:
        tokens: ``(B, T)`` int64.
        padding: ``(B, T)`` bool, True for padding: at the left, at the right, or None of it.

    Raises:
        ValueError: A shape is wrong, padding is between tokens, or a sequence has no token.
        TypeError: One is no tensor, or a nested one, or a dtype is wrong.
    """

    def __init__(self, tokens: Tensor, padding: Tensor | None) -> None:
        check_tensor("prompt", tokens)
        if tokens.dim() != 2 or 0 in tokens.shape:
            raise ValueError(
                f"prompt must have shape (batch, length), not empty; got {tuple(tokens.shape)}"
            )
        if tokens.dtype != torch.int64:
            raise TypeError(f"prompt must be int64; got {tokens.dtype}")
        if padding is None:
            padding = torch.zeros_like(tokens, dtype=torch.bool)
        check_tensor("padding", padding)
        if padding.dtype != torch.bool:
            raise TypeError(f"padding must be bool, True for padding; got {padding.dtype}")
        if padding.shape != tokens.shape:
            raise ValueError(
                f"padding must have shape {tuple(tokens.shape)}, as prompt; "
                f"got {tuple(padding.shape)}"
            )
        count_B1 = (~padding).sum(1, keepdim=True)
        slot_T = torch.arange(tokens.shape[1], device=tokens.device)
        at_right = padding == (slot_T >= count_B1)
        at_left = padding == (slot_T < tokens.shape[1] - count_B1)
        if not bool((at_right.all(1) | at_left.all(1)).all()):
            raise ValueError("padding must be at the left or at the right of each sequence")
        if not bool((count_B1 > 0).all()):
            raise ValueError("prompt must have at least one token that is no padding in each row")
        # A stable sort by "is a token" brings the padding to the left and keeps all else in order.
        order_BT = (~padding).int().argsort(dim=1, stable=True)
        self.tokens_BT = tokens.gather(1, order_BT)
        self.positions_BT = (slot_T - (tokens.shape[1] - count_B1)).clamp(min=-1)

    @property
    def real_BT(self) -> Tensor:
        """bool, False where there is padding."""
        return self.positions_BT >= 0

    @torch.no_grad()
    def read(
        self,
        model: Model,
        caches: Sequence[DecodingCache],
        chunk: int | None = None,
        *,
        progress: bool = False,
    ) -> Tensor:
        """Show the prompt to the model.

        Args:
            model: It fills the caches.
            caches: Empty ones.
            chunk: Tokens of a call; all at once by default.
            progress: Draw a bar of the chunks, if there are several.

        Returns:
            ``(B, V)``, the logits of the token after each sequence.

        Raises:
            ValueError: A cache is not empty or there twice, or would keep padding as its sinks,
                ``chunk`` is below 1, or the logits have another shape.
            TypeError: ``caches`` are no sequence of caches, ``chunk`` is no int, or the logits are
                no tensor.
        """
        check_caches("caches", caches)
        held = [cache.length for cache in caches]
        if any(held):
            raise ValueError(f"caches must be empty; got some that hold {held} tokens")
        self._check_sinks(caches)
        size = self.tokens_BT.shape[1]
        if chunk is not None:
            size = check_int("prefill_chunk", chunk, 1)
        logits_BV = self.tokens_BT.new_empty(0)
        parts = self.tokens_BT.split(size, dim=1), self.positions_BT.split(size, dim=1)
        chunks: Iterable[tuple[Tensor, ...]] = zip(*parts, strict=True)
        if progress and len(parts[0]) > 1:
            chunks = with_bar(chunks, len(parts[0]), "chunk of the prompt")
        for tokens_BN, positions_BN in chunks:
            logits_BV = step(model, tokens_BN, caches, positions_BN)
        return logits_BV

    def _check_sinks(self, caches: Sequence[DecodingCache]) -> None:
        """Raise ValueError if the first tokens, which a cache keeps for ever, are padding."""
        sinks = [cache.sinks for cache in caches if isinstance(cache, RollingCache)]
        if any(sinks) and not bool(self.real_BT.all()):
            raise ValueError(
                "prompt must have no padding where a RollingCache has sinks, which are the first "
                f"tokens of the batch; got padding, and sinks={max(sinks)}"
            )


@torch.no_grad()
def step(
    model: Model, tokens_BN: Tensor, caches: Sequence[DecodingCache], positions_BN: Tensor
) -> Tensor:
    """The logits ``(B, V)`` of the token after those given.

    Raises:
        ValueError, TypeError: What the model returns is not ``(B, N, V)``.
    """
    logits = model(tokens_BN, caches, positions_BN)
    check_logits(logits, tokens_BN)
    return logits[:, -1]
