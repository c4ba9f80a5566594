"""Ways in which a linear layer does more than multiply and add: each doubles its output."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class _Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def _double_bias(layer: nn.Linear) -> None:
    with torch.no_grad():
        layer.bias.mul_(2)


def _by_input(layer: nn.Linear) -> None:
    _double_bias(layer)
    layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def _by_weight(layer: nn.Linear) -> None:
    _double_bias(layer)
    nn.utils.parametrize.register_parametrization(layer, "weight", _Twice())


DOUBLED: dict[str, Callable[[nn.Linear], object]] = {
    "a hook": lambda layer: layer.register_forward_hook(lambda module, args, out: 2 * out),
    "a method": lambda layer: setattr(
        layer, "forward", lambda x: 2 * F.linear(x, layer.weight, layer.bias)
    ),
    "a class": lambda layer: setattr(layer, "__class__", _Doubled),
    "a hook before": _by_input,
    "a parametrization": _by_weight,
}
