"""Zeta: multi-head attention with every feature, exact, in memory linear in sequence length."""

from typing import TYPE_CHECKING

from zeta import biases, caches, generation, masks, nn
from zeta.generation import beam_search, generate
from zeta.ops import (
    BackendUnsupported,
    Explanation,
    LazyWeights,
    attention,
    attention_weights,
    attention_with_lse,
    explain,
    set_float32_precision,
)

if TYPE_CHECKING:
    from zeta.convert.swapping import swap

__version__ = "0.1.0"

__all__ = [
    "BackendUnsupported",
    "Explanation",
    "LazyWeights",
    "__version__",
    "attention",
    "attention_weights",
    "attention_with_lse",
    "beam_search",
    "biases",
    "caches",
    "explain",
    "generate",
    "generation",
    "masks",
    "nn",
    "set_float32_precision",
    "swap",
]


if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        # What stands above the library is imported when it is first asked for.
        if name == "swap":
            from zeta.convert.swapping import swap

            return swap
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
