"""Zeta: multi-head attention with every feature, exact, in memory linear in sequence length."""

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
)

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
]
