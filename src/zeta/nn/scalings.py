"""Frequencies of a `RotaryEmbedding` whose model was taken to longer sequences.

A scaling is a function of the pairs of features alone. It must not depend on the length of a call:
a cache keeps keys that are rotated already.

Shapes: P pairs of features, ``rotary_dim / 2``.
"""

import dataclasses
import math

import torch
from torch import Tensor

from zeta.positions import rotary_frequencies
from zeta.values import check_positive

_ORIGINAL = "original_max_position_embeddings"


@dataclasses.dataclass(frozen=True)
class Scaling:
    """Base of what ``scaling=`` of a `RotaryEmbedding` takes."""

    factor: float

    def __post_init__(self) -> None:
        _check_positive(self, "factor")

    @property
    def magnitude(self) -> float:
        """What cosines and sines are multiplied by; the scores by its square."""
        return 1.0

    def frequencies(
        self, rotary_dim: int, *, base: float, device: torch.device | str | None = None
    ) -> Tensor:
        """Angles of the pairs at position 1.

        Args:
            rotary_dim: Features that are rotated.
            base: Of the `RotaryEmbedding`.
            device: Of the result.

        Returns:
            ``(P,)`` float64.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class LinearScaling(Scaling):
    """Position interpolation (Chen et al., 2023): every position is divided by ``factor``.

    Args:
        factor: It divides every frequency, which is the same.

    Raises:
        TypeError: It is no number.
        ValueError: It is not positive.
    """

    def frequencies(
        self, rotary_dim: int, *, base: float, device: torch.device | str | None = None
    ) -> Tensor:
        """See `Scaling`."""
        return rotary_frequencies(rotary_dim, base=base, device=device) / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling(Scaling):
    """The scaling of Llama 3.1 (Grattafiori et al., The Llama 3 Herd of Models, 2024).

    What a pair of features does depends on how often it turns over the original context::

        turns                     high_freq_factor ... low_freq_factor
        frequency is divided by                  1 ... factor

    Between the two the share of the frequency that is kept falls in proportion to the turns.

    Args:
        factor: By which the frequencies of slow pairs are divided.
        low_freq_factor: Turns up to which a pair is slow.
        high_freq_factor: Turns from which a pair keeps its frequency.
        original_max_position_embeddings: The original context, in tokens.

    Raises:
        TypeError: One is no number.
        ValueError: One is not positive, or ``high_freq_factor`` not more than ``low_freq_factor``.
    """

    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive(self, "low_freq_factor", "high_freq_factor", _ORIGINAL)
        _check_order(self, "low_freq_factor", "high_freq_factor")

    def frequencies(
        self, rotary_dim: int, *, base: float, device: torch.device | str | None = None
    ) -> Tensor:
        """See `Scaling`."""
        frequency_P = rotary_frequencies(rotary_dim, base=base, device=device)
        turns_P = self.original_max_position_embeddings * frequency_P / (2 * math.pi)
        width = self.high_freq_factor - self.low_freq_factor
        kept_P = ((turns_P - self.low_freq_factor) / width).clamp(0.0, 1.0)
        return _divided(frequency_P, self.factor, kept_P)


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnScaling(Scaling):
    """YaRN (Peng et al., 2023): by parts, and with larger scores.

    What a pair of features does depends on how often it turns over the original context::

        turns                     beta_fast ... beta_slow
        frequency is divided by           1 ... factor

    Between the two the share of the frequency that is kept falls from pair to pair by equal steps.

    Args:
        factor: By which the frequencies of slow pairs are divided.
        original_max_position_embeddings: The original context, in tokens.
        beta_fast: Turns from which a pair keeps its frequency.
        beta_slow: Turns up to which a pair is slow.
        attention_factor: What cosines and sines are multiplied by; None: the paper's
            ``0.1 * log(factor) + 1``, or 1 where ``factor`` is not more than 1.
        truncate: The pairs with these turns are rounded to whole ones, outwards, as in the
            authors' code. False: not, as in GPT-OSS.

    Raises:
        TypeError: One is no number, or ``truncate`` neither True nor False.
        ValueError: One is not positive, or ``beta_fast`` not more than ``beta_slow``.
    """

    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive(self, "beta_slow", "beta_fast", _ORIGINAL)
        _check_order(self, "beta_slow", "beta_fast")
        if self.attention_factor is not None:
            _check_positive(self, "attention_factor")
        if not isinstance(self.truncate, bool):
            raise TypeError(f"truncate must be True or False; got {self.truncate!r}")

    @property
    def magnitude(self) -> float:
        """See `Scaling`."""
        if self.attention_factor is not None:
            return float(self.attention_factor)
        return 0.1 * math.log(max(self.factor, 1.0)) + 1.0

    def frequencies(
        self, rotary_dim: int, *, base: float, device: torch.device | str | None = None
    ) -> Tensor:
        """See `Scaling`."""
        frequency_P = rotary_frequencies(rotary_dim, base=base, device=device)
        first = self._pair_with(self.beta_fast, rotary_dim, base)
        last = self._pair_with(self.beta_slow, rotary_dim, base)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        # The last feature, not the last pair, in the authors' code and in what it trained.
        first, last = max(first, 0), min(last, rotary_dim - 1)
        # Where one pair is both, the next is slow.
        width = (last - first) or 1.0
        pair_P = torch.arange(rotary_dim // 2, dtype=torch.float64, device=device)
        kept_P = 1.0 - ((pair_P - first) / width).clamp(0.0, 1.0)
        return _divided(frequency_P, self.factor, kept_P)

    def _pair_with(self, turns: float, rotary_dim: int, base: float) -> float:
        """The pair, a fraction too, that turns so often over the original context."""
        wavelength = self.original_max_position_embeddings / turns
        return rotary_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(base))


def _divided(frequency_P: Tensor, factor: float, kept_P: Tensor) -> Tensor:
    """Frequencies of which a share is kept and the rest divided."""
    return frequency_P * (kept_P + (1.0 - kept_P) / factor)


def _check_positive(scaling: Scaling, *names: str) -> None:
    for name in names:
        check_positive(name, getattr(scaling, name))


def _check_order(scaling: Scaling, low: str, high: str) -> None:
    limit, value = getattr(scaling, low), getattr(scaling, high)
    if not value > limit:
        raise ValueError(f"{high} must be more than {low}={limit}; got {value}")
