"""`projection` as operators of ``torch.library``, for few tokens in compiled code.

Their own kernels are in ``native/operators.cpp``. Those of Python here, which is torch, run where
there are too many rows after all, or a tensor is not plainly right.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from zeta.ops.backends.cpu import library
from zeta.ops.backends.cpu.description import DTYPES
from zeta.ops.backends.cpu.projection import Layer, most_rows
from zeta.ops.registration import operator
from zeta.standin import PLAIN


@operator("cpu_project")
def _project(x: Tensor, weight: Tensor, bias: Tensor | None, most_rows: int) -> Tensor:
    return F.linear(x, weight, bias).contiguous()


@_project.register_fake
def _(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@operator("cpu_project_three")
def _project_three(
    x: Tensor,
    query_weight: Tensor,
    query_bias: Tensor | None,
    key_weight: Tensor,
    key_bias: Tensor | None,
    value_weight: Tensor,
    value_bias: Tensor | None,
    head_dim: int,
    most_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    query = F.linear(x, query_weight, query_bias).contiguous()
    key = F.linear(x, key_weight, key_bias).contiguous()
    value = F.linear(x, value_weight, value_bias).contiguous()
    return _heads(query, head_dim), _heads(key, head_dim), _heads(value, head_dim)


@_project_three.register_fake
def _(
    x: Tensor,
    query_weight: Tensor,
    _: Tensor | None,
    key_weight: Tensor,
    __: Tensor | None,
    value_weight: Tensor,
    ___: Tensor | None,
    head_dim: int,
    ____: int,
) -> tuple[Tensor, ...]:
    weights = query_weight, key_weight, value_weight
    return tuple(
        _heads(x.new_empty((*x.shape[:-1], weight.shape[0])), head_dim) for weight in weights
    )


def project(x: Tensor, layer: Layer) -> Tensor | None:
    """``x weight^T + bias``, ``(..., features)``; None where torch is to do it.

    Args:
        x: ``(..., width)``, without a gradient, traced by a compiler.
        layer: The same.
    """
    if not _are_plain(x, [layer]):
        return None
    found: Tensor = _project.overload(x, *layer, most_rows(x.dtype, x.shape[-1]))
    return found


def project_heads(x: Tensor, layers: Sequence[Layer], head_dim: int) -> tuple[Tensor, ...] | None:
    """The same of each layer, ``(B, heads, L, head_dim)``.

    Args:
        x: ``(B, L, width)``, the same.
        layers: One or three.
        head_dim: Features of a head.
    """
    if not _are_plain(x, layers) or any(weight.shape[0] % head_dim for weight, _ in layers):
        return None
    most = most_rows(x.dtype, x.shape[-1])
    if len(layers) == 1:
        return (_heads(_project.overload(x, *layers[0], most), head_dim),)
    query, key, value = layers
    found: tuple[Tensor, ...] = _project_three.overload(x, *query, *key, *value, head_dim, most)
    return found


def _are_plain(x: Tensor, layers: Sequence[Layer]) -> bool:
    """Whether these are linear layers of x as torch has them, and the library is there."""
    if library.obstacle() is not None or type(x) is not Tensor:
        return False
    if x.dtype not in DTYPES or x.dim() != 3:
        return False
    for weight, bias in layers:
        if type(weight) not in PLAIN or weight.dtype != x.dtype or weight.shape[1] != x.shape[2]:
            return False
        if bias is not None and (type(bias) not in PLAIN or bias.dtype != x.dtype):
            return False
    return True


def _heads(features: Tensor, head_dim: int) -> Tensor:
    """``(B, L, heads * head_dim)`` as ``(B, heads, L, head_dim)``."""
    batch, length, width = features.shape
    return features.view(batch, length, width // head_dim, head_dim).transpose(1, 2)


for each in (_project, _project_three):
    each.keep_python_kernel()
library.register_operators()
