"""How attention's parameters are drawn."""

import math
from collections.abc import Iterable

from torch import Tensor, nn

from zeta.nn.multiway import Ways
from zeta.nn.norms import RMSNorm


def draw_projection(projection: nn.Module, gain: float) -> None:
    """Xavier uniform weights (Glorot and Bengio, 2010); biases as in ``nn.Linear``.

    Args:
        projection: ``nn.Linear``, or a multiway module of them.
        gain: Factor of the weights' standard deviation.

    Raises:
        TypeError: It is another layer, such as an adapter or a quantised one, or its weight is no
            parameter.
    """
    for linear in ways_of(projection):
        if not isinstance(linear, nn.Linear):
            raise TypeError(
                "reset_parameters draws projections that are nn.Linear; "
                f"got {type(linear).__name__} in the place of one"
            )
        if "weight" not in linear._parameters:
            raise TypeError(
                "reset_parameters draws the weight of a projection, but that of one is made of "
                "other parameters, as by pruning or torch.nn.utils.parametrize"
            )
        linear.reset_parameters()
        nn.init.xavier_uniform_(linear.weight, gain=gain)


def draw_inputs(projections: Iterable[nn.Module]) -> None:
    """Draw the projections of queries, keys and values, with gain ``1 / sqrt(2)``."""
    for projection in projections:
        draw_projection(projection, 1.0 / math.sqrt(2.0))


def draw_output(projection: nn.Module) -> None:
    """Draw the output projection: gain 1, bias 0."""
    draw_projection(projection, 1.0)
    for linear in ways_of(projection):
        if isinstance(linear.bias, nn.Parameter):
            nn.init.zeros_(linear.bias)


def draw_extra_key(bias_k: Tensor | None, bias_v: Tensor | None) -> None:
    """Draw a learned key and value, where there are any: Xavier normal, as torch does."""
    for parameter in (bias_k, bias_v):
        if parameter is not None:
            nn.init.xavier_normal_(parameter)


def reset_norms(norms: Iterable[nn.Module | None]) -> None:
    """Factors 1 and biases 0, where there are any."""
    for norm in norms:
        for part in [] if norm is None else ways_of(norm):
            if isinstance(part, nn.LayerNorm | RMSNorm):
                part.reset_parameters()


def ways_of(module: nn.Module) -> list[nn.Module]:
    """The modules that a possibly multiway one consists of."""
    return list(module.children()) if isinstance(module, Ways) else [module]
