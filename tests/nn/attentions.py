"""Attentions in float64, their tokens, and comparisons with the textbook."""

from typing import Any

import torch
from torch import Tensor

from zeta.nn import MultiheadAttention

B, H, T, S, E = 3, 4, 5, 7, 16
EXACT = {"rtol": 0.0, "atol": 1e-12}


def make(**options: Any) -> MultiheadAttention:
    """A float64 module in evaluation mode."""
    args = options.pop("args", None)
    sizes = (options.pop("embed_dim", E), options.pop("num_heads", H))
    return MultiheadAttention(args, *sizes, **{"dtype": torch.float64, **options}).eval()


def tokens(length: int, features: int = E, batch: int = B, **options: Any) -> Tensor:
    return torch.randn(batch, length, features, **{"dtype": torch.float64, **options})


def check_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Outputs and weights are equal."""
    torch.testing.assert_close(found[0], expected[0], **EXACT)
    torch.testing.assert_close(torch.as_tensor(found[1]), expected[1], **EXACT)


def check_same_gradients(
    found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], inputs: list[Tensor]
) -> None:
    """They are, and so are the gradients of what they were made from."""
    check_same(found, expected)
    cotangents = [torch.randn_like(t) for t in expected]
    gradients = [torch.autograd.grad(outputs, inputs, cotangents) for outputs in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)
