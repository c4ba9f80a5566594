"""What the tests of this folder hand to other packages: a layer as a model would have it."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from zeta.nn import MultiheadAttention, RelativePositionBias

EMBED, HEADS = 32, 4


class Layer(nn.Module):
    """Self-attention, with a learned bias if asked for; the output alone, or weights as well."""

    def __init__(
        self,
        args: object = None,
        *,
        biased: bool = False,
        causal: bool = False,
        weights: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        options.setdefault("self_attention", True)
        self.attention = MultiheadAttention(args, EMBED, HEADS, **options)
        self.bias = RelativePositionBias(n_heads=HEADS, max_distance=20) if biased else None
        self.causal = causal
        self.weights = weights

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Any:
        out, weights = self.attention(
            x, x, x, key_padding_mask=padding, rel_pos=self.bias, is_causal=self.causal
        )
        return (out, weights) if self.weights else out


def tokens(batch: int = 3, length: int = 9) -> Tensor:
    """``(batch, length, EMBED)``, the same for the same sizes."""
    generator = torch.Generator().manual_seed(1000 * batch + length)
    return torch.randn(batch, length, EMBED, generator=generator)


def padding(batch: int = 3, length: int = 9) -> Tensor:
    """``(batch, length)``, True for padding: less in each sequence; all of the first is padding."""
    lengths = torch.tensor([math.ceil(length * row / batch) for row in range(batch)])
    return torch.arange(length) >= lengths[:, None]


def batches(num: int, size: int = 2) -> list[Tensor]:
    """Different batches of ``size`` sequences."""
    return list(torch.randn(num, size, 9, EMBED, generator=torch.Generator().manual_seed(5)))


def loss(out: Tensor, x: Tensor) -> Tensor:
    """Of every output, each with a factor of its own, and no larger for a larger batch."""
    return (out * torch.linspace(-1, 1, EMBED) - x.detach()).square().mean()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of each parameter that has one."""
    return {
        name: parameter.grad.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
