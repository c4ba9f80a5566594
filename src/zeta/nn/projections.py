"""Linear layers of a module, where there is a shorter way than to call each.

Several go at once for the few tokens of a decoding step. In half precision they multiply in float32
on processors without instructions for it, on which torch takes several times as long.
"""

import functools
import platform
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from zeta.ops.projection import MAX_ROWS, Layer, project_few, project_few_heads
from zeta.standin import PLAIN
from zeta.transforms import constant_in_graphs

_FORWARD = nn.Linear.forward
"""As torch has it; who replaces it is asked."""

HALVES = (torch.bfloat16, torch.float16)

MIN_ROWS = 16
"""From so many on products in float32 take less time than torch's without instructions for them."""


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
    layers = _few_layers(x, modules)
    found = None if layers is None else project_few_heads(x, layers, head_dim)
    if found is None:
        made = _in_float32(x, modules)
        if made is not None:
            batch, length, _ = x.shape
            found = tuple(out.view(batch, length, -1, head_dim).transpose(1, 2) for out in made)
    return found


def project(x: Tensor, module: nn.Module) -> Tensor:
    """``module(x)``, by the shortest way.

    Args:
        x: ``(B, L, E)``.
        module: Any.
    """
    layers = _few_layers(x, (module,))
    found = None if layers is None else project_few(x, layers[0])
    return called(module, x) if found is None else found


def called(module: nn.Module, x: Tensor, **options: Any) -> Tensor:
    """``module(x, **options)``; a plain linear layer with products in float32, where those in half
    precision take longer.
    """
    made = None if options else _in_float32(x, (module,))
    out: Tensor = module(x, **options) if made is None else made[0]
    return out


def _in_float32(x: Tensor, modules: Sequence[nn.Module]) -> list[Tensor] | None:
    """``module(x)`` of each, rounded once to half precision; None where torch is sooner done, or
    has to see the layer. With a gradient the difference is a factor of 5 to 50 at 256 rows.
    """
    if x.dtype not in HALVES or type(x) is not Tensor or not x.is_cpu or has_products(x.dtype):
        return None
    # A compiler's graph is not to be bound to a number of rows.
    if not torch.compiler.is_compiling() and x.numel() < MIN_ROWS * x.shape[-1]:
        return None
    layers = _plain_layers(modules)
    if layers is None or torch.is_autocast_enabled("cpu"):
        return None
    for tensor in chain.from_iterable(layers):
        # Another class, or dtype, has products of its own, or none.
        if tensor is not None and (type(tensor) not in PLAIN or tensor.dtype != x.dtype):
            return None
    wide = x.float()
    return [
        F.linear(wide, weight.float(), None if bias is None else bias.float()).to(x.dtype)
        for weight, bias in layers
    ]


@constant_in_graphs
def has_products(dtype: torch.dtype) -> bool:
    """Whether torch multiplies matrices of this half precision as fast as those of float32 on this
    processor. On x86 it needs instructions for it; without, its loops are several times slower.
    """
    return dtype in _halves_with_products()


@functools.cache
def _halves_with_products() -> tuple[torch.dtype, ...]:
    # Every projection asks, and the processor stays the same.
    if platform.machine() not in ("x86_64", "AMD64"):
        return HALVES
    if not torch.backends.mkldnn.is_available():
        return ()
    onednn = torch.ops.mkldnn
    answers = [onednn._is_mkldnn_bf16_supported(), onednn._is_mkldnn_fp16_supported()]
    if torch.cpu._is_avx512_supported() and not torch.cpu._is_avx512_bf16_supported():
        # There oneDNN makes bfloat16 out of other instructions, and takes several times as long.
        answers[0] = False
    return tuple(dtype for dtype, has in zip(HALVES, answers, strict=True) if has)


def _few_layers(x: Tensor, modules: Sequence[nn.Module]) -> list[Layer] | None:
    """Weights and biases for a few rows; None where it is not worth it, or torch has to see it."""
    has_gradients = torch.is_grad_enabled()
    if torch.compiler.is_compiling():
        if has_gradients or not _may_be_few(x):
            return None
    elif x.shape[0] * x.shape[1] > MAX_ROWS:
        return None
    if has_gradients:
        # As soon as possible: in training every call comes here in vain.
        layer = _plain_linear(modules[0])
        if layer is None or layer[0].requires_grad:
            return None
    return _plain_layers(modules)


def _plain_layers(modules: Sequence[nn.Module]) -> list[Layer] | None:
    """Weights and biases; None where torch has to see a layer."""
    layers: list[Layer] = []
    for module in modules:
        layer = _plain_linear(module)
        if layer is None:
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
        return not statically_known_true(batch > MAX_ROWS)
    return bool(statically_known_true(batch * length <= MAX_ROWS))


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
