"""Several linear layers of a module at once, for the few tokens of a decoding step."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from zeta.ops.projection import FEW, Layer, project_few, project_few_heads

_FORWARD = nn.Linear.forward
"""As torch has it; who replaces it is asked."""


def project_heads(
    x: Tensor, modules: Sequence[nn.Module], head_dim: int
) -> tuple[Tensor, ...] | None:
    """``module(x)`` of each in heads ``(B, heads, L, head_dim)``; None where each has to be called,
    as it mostly has.

    Args:
        x: ``(B, L, E)``.
        modules: Any; only plain linear layers, which nobody hooks into, go together.
        head_dim: Features of a head.
    """
    layers = _plain_layers(x, modules)
    return None if layers is None else project_few_heads(x, layers, head_dim)


def project(x: Tensor, module: nn.Module) -> Tensor:
    """``module(x)``, by the shortest way.

    Args:
        x: ``(B, L, E)``.
        module: Any.
    """
    layers = _plain_layers(x, (module,))
    found = None if layers is None else project_few(x, layers[0])
    out: Tensor = module(x) if found is None else found
    return out


def _plain_layers(x: Tensor, modules: Sequence[nn.Module]) -> list[Layer] | None:
    """Weights and biases; None where it is not worth it, or torch has to see it."""
    has_gradients = torch.is_grad_enabled()
    if torch.compiler.is_compiling():
        if has_gradients or not _may_be_few(x):
            return None
    elif x.shape[0] * x.shape[1] > FEW:
        return None
    layers: list[Layer] = []
    for module in modules:
        layer = _plain_linear(module)
        # As soon as possible: in training every call comes here in vain.
        if layer is None or (has_gradients and layer[0].requires_grad):
            return None
        layers.append(layer)
    if nn.Linear.forward is not _FORWARD or torch_module._has_any_global_hook():
        return None
    return layers


def _may_be_few(x: Tensor) -> bool:
    """While a compiler traces: whether the rows are few, for all that it knows. One graph for all
    sizes must not be bound to some; of single tokens, the batch may turn out to be large.
    """
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    batch, length, _ = x.shape
    if statically_known_true(length == 1):
        return not statically_known_true(batch > FEW)
    return bool(statically_known_true(batch * length <= FEW))


def _plain_linear(module: nn.Module) -> Layer | None:
    """Weight and bias of a module that does nothing but multiply and add."""
    if type(module) is not nn.Linear:
        return None
    own = module.__dict__
    if (
        own["_forward_pre_hooks"]
        or own["_forward_hooks"]
        or own["_backward_pre_hooks"]
        or own["_backward_hooks"]
        or "forward" in own
    ):
        return None
    parameters = own["_parameters"]
    # Whoever takes a parameter out of the module computes it by other means.
    if "weight" not in parameters or "bias" not in parameters:
        return None
    return parameters["weight"], parameters["bias"]
