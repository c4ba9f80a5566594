"""How the next token is chosen from its logits: `Greedy` and `Sampling`.

Shapes: B sequences of the prompt, R of them that still go on, T prompt length, V vocabulary.
"""

import dataclasses
import math
import sys
from typing import Protocol

import torch
from torch import Tensor

from zeta.generation.checks import check_int
from zeta.generation.drawing import Uniforms, draw
from zeta.values import check_number, check_positive


class Choice(Protocol):
    """A way to choose, without a state."""

    @property
    def repetition_penalty(self) -> float:
        """1 for none."""
        ...

    @property
    def seed(self) -> int:
        """Of the draws."""
        ...

    def probabilities(self, logits_RV: Tensor) -> Tensor:
        """The distribution that is drawn from, ``(R, V)`` float64, the penalty apart."""
        ...

    def start(self, prompt_BT: Tensor, real_BT: Tensor) -> "Choosing":
        """Begin a generation.

        Args:
            prompt_BT: Tokens.
            real_BT: bool, False where they are padding.
        """
        ...


class Choosing(Protocol):
    """One generation's state of a `Choice`."""

    def __call__(self, logits_RV: Tensor, rows_R: Tensor) -> Tensor:
        """Tokens ``(R,)`` for the sequences ``rows_R`` of the prompt, called once a step."""
        ...


def relative(logits: Tensor) -> Tensor:
    """Logits less the largest of each distribution, float64; 0 where they are infinite.

    NaN where no token can be chosen: see `has_no_token`.
    """
    wide = logits.double()
    return torch.where(wide == math.inf, 0.0, wide - wide.amax(-1, keepdim=True))


@dataclasses.dataclass(frozen=True)
class Greedy:
    """The likeliest token; of equally likely ones the first.

    Args:
        repetition_penalty: See `Sampling`.

    Raises:
        ValueError: ``repetition_penalty`` is not positive and finite.
        TypeError: It is no number.
    """

    repetition_penalty: float = 1.0

    @property
    def seed(self) -> int:
        """Any: nothing is drawn."""
        return 0

    def __post_init__(self) -> None:
        check_positive("repetition_penalty", self.repetition_penalty)

    def start(self, prompt_BT: Tensor, real_BT: Tensor) -> Choosing:
        """See `Choice`."""
        penalty = _Penalty(self.repetition_penalty, prompt_BT, real_BT)

        def choose(logits_RV: Tensor, rows_R: Tensor) -> Tensor:
            token_R = penalty.applied(logits_RV, rows_R).argmax(-1)
            penalty.saw(token_R, rows_R)
            return token_R

        return choose

    def probabilities(self, logits_RV: Tensor) -> Tensor:
        """All on the likeliest token, ``(R, V)`` float64, the penalty apart."""
        likeliest_R1 = logits_RV.argmax(-1, keepdim=True)
        return torch.zeros_like(logits_RV, dtype=torch.float64).scatter(-1, likeliest_R1, 1.0)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """A token drawn from the distribution, after it has been narrowed in this order.

    A sequence's draws depend on the seed, its place in the batch and the step alone: not on how
    many neighbours it has, when they finish, or the device. Only with a draft they also depend on
    how many of its tokens are accepted.

    Infinite logits share all of the probability.

    Args:
        temperature: Divides the logits, after the penalty.
        top_k: Only the ``top_k`` likeliest tokens; all by default.
        top_p: Only the likeliest tokens that together have at least this probability (Holtzman et
            al., The Curious Case of Neural Text Degeneration, 2020).
        min_p: Only tokens at least ``min_p`` times as likely as the likeliest.
        repetition_penalty: Positive logits of tokens that are in the sequence already are divided
            by it, negative ones multiplied (Keskar et al., CTRL, 2019, section 4.1).
        seed: Of the draws.

    Raises:
        ValueError: A number is out of its range.
        TypeError: ``top_k`` or ``seed`` is no int, or another argument no number.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p"):
            check_number(name, getattr(self, name))
        if not self.temperature > 0:
            raise ValueError(
                f"temperature must be positive (Greedy() is its limit at 0); got {self.temperature}"
            )
        if self.top_k is not None:
            check_int("top_k", self.top_k, 1)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1]; got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1]; got {self.min_p}")
        check_int("seed", self.seed)
        if not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"seed must be in [-2**63, 2**64); got {self.seed}")
        check_positive("repetition_penalty", self.repetition_penalty)

    def start(self, prompt_BT: Tensor, real_BT: Tensor) -> Choosing:
        """See `Choice`."""
        penalty = _Penalty(self.repetition_penalty, prompt_BT, real_BT)
        uniforms = Uniforms(self.seed)

        def choose(logits_RV: Tensor, rows_R: Tensor) -> Tensor:
            probability_RV = self.probabilities(penalty.applied(logits_RV, rows_R))
            token_R = draw(probability_RV, uniforms(rows_R))
            penalty.saw(token_R, rows_R)
            return token_R

        return choose

    def probabilities(self, logits_RV: Tensor) -> Tensor:
        """The distribution that is drawn from, ``(R, V)`` float64, the penalty apart."""
        # Within the limits of what has a reciprocal, by which a GPU multiplies.
        temperature = min(max(self.temperature, sys.float_info.min), sys.float_info.max)
        probability_RV = (relative(logits_RV) / temperature).softmax(-1)
        if self.top_k is None and self.top_p == 1 and self.min_p == 0:
            return probability_RV
        order_RV = probability_RV.argsort(dim=-1, descending=True, stable=True)
        sorted_RV = probability_RV.gather(-1, order_RV)
        if self.top_k is not None:
            sorted_RV[:, self.top_k :] = 0
        if self.top_p < 1:
            sorted_RV = sorted_RV / sorted_RV.sum(-1, keepdim=True)
            before_RV = sorted_RV.cumsum(-1) - sorted_RV
            sorted_RV = torch.where(before_RV < self.top_p, sorted_RV, 0.0)
        sorted_RV = torch.where(sorted_RV >= self.min_p * sorted_RV[:, :1], sorted_RV, 0.0)
        kept_RV = torch.zeros_like(sorted_RV).scatter(-1, order_RV, sorted_RV)
        return kept_RV / kept_RV.sum(-1, keepdim=True)


class _Penalty:
    """The repetition penalty, and which tokens each sequence has."""

    def __init__(self, factor: float, prompt_BT: Tensor, real_BT: Tensor) -> None:
        self._factor = factor
        self._prompt_BT, self._real_BT = prompt_BT, real_BT
        self._seen_BV: Tensor | None = None

    def applied(self, logits_RV: Tensor, rows_R: Tensor) -> Tensor:
        if self._factor == 1.0:
            return logits_RV
        if self._seen_BV is None:
            self._seen_BV = self._seen(logits_RV.shape[-1], logits_RV.device)
        wide = logits_RV.double()
        penalised = torch.where(wide > 0, wide / self._factor, wide * self._factor)
        return torch.where(self._seen_BV[rows_R], penalised, wide)

    def _seen(self, vocabulary: int, device: torch.device) -> Tensor:
        """``(B, V)`` bool, True for the tokens of the prompts."""
        # Others, as those of images, have no logit; padding may be of any number.
        is_token = self._real_BT & (self._prompt_BT >= 0) & (self._prompt_BT < vocabulary)
        # Nothing could be written to a tensor of inference mode outside of it.
        with torch.inference_mode(False):
            count_BV = torch.zeros(len(is_token), vocabulary, dtype=torch.int64, device=device)
            count_BV.scatter_add_(1, self._prompt_BT.where(is_token, 0), is_token.long())
            return count_BV > 0

    def saw(self, token_R: Tensor, rows_R: Tensor) -> None:
        if self._seen_BV is not None:
            self._seen_BV[rows_R, token_R] = True
