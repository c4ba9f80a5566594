"""The functional op: pure functions of tensors, no parameters."""

from zeta.ops.attention import (
    Explanation,
    attention,
    attention_weights,
    attention_with_lse,
    explain,
)
from zeta.ops.call import BackendUnsupported
from zeta.ops.precision import set_float32_precision
from zeta.ops.weights import LazyWeights

__all__ = [
    "BackendUnsupported",
    "Explanation",
    "LazyWeights",
    "attention",
    "attention_weights",
    "attention_with_lse",
    "explain",
    "set_float32_precision",
]
