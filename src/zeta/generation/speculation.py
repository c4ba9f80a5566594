"""Speculative decoding: a draft model proposes tokens, the model checks them all in one call.

Shapes: R sequences that still go on, K drafted tokens, V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zeta.caches import CrossCache, DecodingCache, PagedCache, RollingCache
from zeta.generation.checks import (
    check_caches,
    check_choice,
    check_int,
    check_logits,
    has_no_token,
)
from zeta.generation.drawing import draw
from zeta.generation.prompts import Model, step


@dataclasses.dataclass(frozen=True)
class Draft:
    """A cheaper model with the same vocabulary, to propose tokens.

    The continuation has the distribution that it has without a draft (Leviathan et al., Fast
    Inference from Transformers via Speculative Decoding, 2023); under `Greedy` it is the same. All
    sequences of a batch go on by the smallest number of tokens accepted in any of them.

    Args:
        model: See `Model`.
        caches: Its own, empty; at least one, as for the model itself.
        num_tokens: Tokens it proposes at a time; fewer than the window of any `RollingCache`, of
            the model's too, which must find what stood before those that are not accepted.

    Raises:
        ValueError: ``num_tokens`` is below 1.
        TypeError: It is no int.
    """

    model: Model
    caches: Sequence[DecodingCache]
    num_tokens: int = 4

    def __post_init__(self) -> None:
        num_tokens = check_int("num_tokens", self.num_tokens, 1)
        object.__setattr__(self, "num_tokens", num_tokens)


class Speculation:
    """One generation with a draft.

    Args:
        model: The model that decides; its caches have all tokens but the last of each sequence.
        caches: Those of ``model``.
        draft: Its caches too have all tokens but the last.
        probabilities: From logits ``(R, V)`` to the distribution that is drawn from, float64.
        uniforms: ``(R,)`` new float64 numbers in ``[0, 1)`` of the sequences ``(R,)``.
    """

    def __init__(
        self,
        model: Model,
        caches: Sequence[DecodingCache],
        draft: Draft,
        probabilities: Callable[[Tensor], Tensor],
        uniforms: Callable[[Tensor], Tensor],
    ) -> None:
        self._model, self._caches, self._draft = model, caches, draft
        self._probabilities, self._uniforms = probabilities, uniforms
        # Tokens that the model has seen and the draft has not: the last that it proposed.
        self._behind = 0

    @torch.no_grad()
    def advance(
        self, recent: Tensor, position_R: Tensor, rows_R: Tensor, number: int, most: int
    ) -> Tensor:
        """The next tokens of each sequence.

        Args:
            recent: ``(R, 2)``, the last two tokens.
            position_R: Positions of the last tokens.
            rows_R: The sequences' numbers, for ``uniforms``.
            number: Of the first new token, for messages.
            most: The greatest number of tokens to come back, at least 1.

        Returns:
            ``(R, N)``, ``1 <= N <= most``. Whatever is raised, the caches are as they were.

        Raises:
            ValueError: The model or the draft returns logits of another shape, or the model ones
                of which no token can be chosen where it must be.
        """
        count = min(self._draft.num_tokens, most - 1)
        every = (*self._caches, *self._draft.caches)
        for cache in every:
            cache.fork()
        try:
            new = self._checked(recent, position_R, rows_R, number, count)
        except BaseException:
            for cache in every:
                cache.rollback()
            raise
        refused = count + 1 - new.shape[1]
        for caches, surplus in ((self._caches, refused), (self._draft.caches, refused - 1)):
            for cache in caches:
                if surplus > 0:
                    _drop(cache, surplus)
                cache.commit()
        self._behind = int(refused == 0)
        return new

    def _checked(
        self,
        recent: Tensor,
        position_R: Tensor,
        rows_R: Tensor,
        number: int,
        count: int,
    ) -> Tensor:
        """What `advance` returns; the caches have all of the ``count`` that were proposed."""
        drafted_RK, draft_RKV = self._propose(recent, position_R, rows_R, count)
        tokens = torch.cat((recent[:, -1:], drafted_RK), dim=1)
        positions = position_R[:, None] + torch.arange(count + 1, device=recent.device)
        logits = self._model(tokens, self._caches, positions)
        check_logits(logits, tokens)
        wanted = self._probabilities(logits.flatten(0, 1)).unflatten(0, (-1, count + 1))
        # Before the first position of which no token can be chosen.
        known_R = (~has_no_token(logits)).long().cumprod(1).sum(1)
        accepted_R = self._accepted(drafted_RK, draft_RKV, wanted, rows_R).minimum(known_R)
        common, known = torch.stack((accepted_R.min(), known_R.min())).tolist()
        check_choice(known == common, logits[:, common], number + common)
        last_R = self._drawn(_residual(wanted, draft_RKV, common), rows_R)
        if common < count:
            last_R = torch.where(accepted_R > common, drafted_RK[:, common], last_R)
        return torch.cat((drafted_RK[:, :common], last_R[:, None]), dim=1)

    def _propose(
        self, recent: Tensor, position_R: Tensor, rows_R: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        """``count`` tokens of the draft, ``(R, K)``, and their distributions ``(R, K, V)``."""
        # The last token, and the one before it where the draft has not seen that either.
        behind = self._behind
        tokens = recent[:, -1 - behind :]
        positions = position_R[:, None] + torch.arange(-behind, 1, device=recent.device)
        drafted, distributions = [], []
        for _ in range(count):
            logits_RV = step(self._draft.model, tokens, self._draft.caches, positions)
            distributions.append(self._probabilities(logits_RV))
            drafted.append(self._drawn(distributions[-1], rows_R))
            tokens, positions = drafted[-1][:, None], positions[:, -1:] + 1
        if not drafted:
            return recent[:, :0], torch.zeros(len(recent), 0, 1, device=recent.device)
        return torch.stack(drafted, dim=1), torch.stack(distributions, dim=1)

    def _accepted(
        self, drafted_RK: Tensor, draft_RKV: Tensor, wanted: Tensor, rows_R: Tensor
    ) -> Tensor:
        """How many drafted tokens of each sequence are accepted before the first that is not."""
        accepted_R = torch.zeros(len(rows_R), dtype=torch.int64, device=rows_R.device)
        going_R = torch.ones_like(accepted_R)
        for k in range(drafted_RK.shape[1]):
            token_R1 = drafted_RK[:, k : k + 1]
            ratio_R1 = wanted[:, k].gather(1, token_R1) / draft_RKV[:, k].gather(1, token_R1)
            going_R = going_R * (self._uniforms(rows_R) < ratio_R1[:, 0])
            accepted_R = accepted_R + going_R
        return accepted_R

    def _drawn(self, probability_RV: Tensor, rows_R: Tensor) -> Tensor:
        return draw(probability_RV, self._uniforms(rows_R))


def check_draft(draft: Draft, caches: Sequence[DecodingCache]) -> None:
    """Check a draft against the caches of the model.

    Raises:
        TypeError: It is no `Draft`, or caches are none.
        ValueError: There is no cache, or a window is too short for what is to be taken back.
    """
    if not isinstance(draft, Draft):
        raise TypeError(f"draft must be a Draft; got {type(draft).__name__}")
    for name, held in (("caches", caches), ("draft.caches", draft.caches)):
        check_caches(name, held)
        if not any(isinstance(cache, DecodingCache) for cache in held):
            raise ValueError(f"{name} must hold at least one cache that grows, to use a draft")
        for cache in held:
            if isinstance(cache, RollingCache) and cache.window <= draft.num_tokens:
                raise ValueError(
                    f"draft.num_tokens must be below the window of a RollingCache, "
                    f"{cache.window}; got {draft.num_tokens}"
                )


def _drop(cache: DecodingCache, count: int) -> None:
    """Forget the last tokens of each sequence."""
    if isinstance(cache, PagedCache | CrossCache):
        # Its sequences may differ in length, or it has a length of another kind.
        cache.drop(count)
    else:
        cache.crop(cache.length - count)


def _residual(wanted: Tensor, draft_RKV: Tensor, at: int) -> Tensor:
    """What a rejected token is drawn from instead: where the model wants more than the draft."""
    wanted_RV = wanted[:, at]
    if at == draft_RKV.shape[1]:
        return wanted_RV
    more_RV = (wanted_RV - draft_RKV[:, at]).clamp(min=0)
    total_R1 = more_RV.sum(-1, keepdim=True)
    # No token is rejected where the two agree; the result is not used then.
    return torch.where(total_R1 > 0, more_RV / total_R1, wanted_RV)
