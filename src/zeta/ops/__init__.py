"""The functional op: pure functions of tensors, no parameters."""

from zeta.ops.attention import (
    Explanation,
    attention,
    attention_weights,
    attention_with_lse,
    explain,
)
from zeta.ops.call import BackendUnsupported

__all__ = [
    "BackendUnsupported",
    "Explanation",
    "attention",
    "attention_weights",
    "attention_with_lse",
    "explain",
]
