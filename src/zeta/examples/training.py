"""How the examples are trained: Muon for matrices, AdamW for the rest, one schedule for both."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from zeta.examples.muon import Muon
from zeta.nn import RelativePositionBias


def optimizers(model: nn.Module, learning_rate: float) -> list[Optimizer]:
    """Muon (Jordan, 2024) for the matrices inside the layers, AdamW for everything else.

    A relative position bias is a handful of raw scores, which must move by whole units where a
    weight moves by hundredths: it learns ten times as fast.

    Args:
        model: Whose parameters are trained.
        learning_rate: Of all but the relative position biases.

    Returns:
        Two optimizers; both must step.
    """
    tables = [
        parameter
        for module in model.modules()
        if isinstance(module, RelativePositionBias)
        for parameter in module.parameters()
    ]
    hidden = [
        parameter
        for layers in model.modules()
        if isinstance(layers, nn.ModuleList)
        for parameter in layers.parameters()
        if parameter.ndim == 2
    ]
    taken = {id(parameter) for parameter in [*tables, *hidden]}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in taken]
    groups: list[dict[str, Any]] = [
        {"params": rest},
        {"params": tables, "lr": 10 * learning_rate},
    ]
    return [
        Muon(hidden, learning_rate, weight_decay=0.1),
        AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def training_step(model: nn.Module, loss: Tensor, optimizers: list[Optimizer]) -> None:
    """Go backward from a loss, and move the parameters."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()


def fit(
    model: nn.Module, loss: Callable[[], Tensor], steps: int, learning_rate: float = 4e-3
) -> Iterator[float]:
    """Train a model, which is left in evaluation mode.

    The learning rate rises for a tenth of the steps, and falls to zero from the third tenth on.

    Args:
        model: What is trained.
        loss: Draws a batch and returns the model's loss on it.
        steps: How many.
        learning_rate: The highest.

    Yields:
        The loss of each step.
    """
    model.train()
    both = optimizers(model, learning_rate)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in both]
    for step in range(steps):
        factor = min(1.0, 10 * (step + 1) / steps, (steps - step) / (0.7 * steps))
        for optimizer, rates in zip(both, peaks, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = factor * rate
        value = loss()
        training_step(model, value, both)
        yield value.item()
    model.eval()
