"""Norms of queries and keys, head by head: what ``qk_norm=`` of an attention names."""

from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zeta.values import wide_dtype

QueryKeyNorm: TypeAlias = Literal["rms", "l2"]


class UnitNorm(nn.Module):
    """Divides by the Euclidean norm, taken in float32 or wider.

    Args:
        eps: The norm is taken to be at least this.
    """

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """``(..., D)`` to unit length along the last dimension, in the dtype of ``x``."""
        wide = x.to(wide_dtype(x.dtype))
        return F.normalize(wide, dim=-1, eps=self.eps).to(x.dtype)


class RMSNorm(nn.Module):
    """Divides by the root mean square and multiplies by a learned factor, in float32 or wider.

    ``nn.RMSNorm``, but for inputs of another dtype than its parameter, as under autocast.

    Args:
        dim: Features.
        eps: Added to the mean square.
        device: Of the parameter.
        dtype: Of the parameter.
    """

    def __init__(
        self,
        dim: int,
        eps: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Factors of 1."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., D)`` normalised along the last dimension, in the dtype of ``x``."""
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        shape, weight = tuple(self.weight.shape), self.weight.to(dtype)
        return F.rms_norm(x.to(dtype), shape, weight, self.eps).to(x.dtype)


def query_key_norm(
    kind: QueryKeyNorm | None,
    head_dim: int,
    eps: float,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.Module | None:
    """A norm over the features of a head.

    Args:
        kind: ``"rms"``: root mean square with a learned factor a feature (Henry et al., 2020, and
            Dehghani et al., ViT-22B, 2023). ``"l2"``: unit length, without parameters. None: no
            norm.
        head_dim: Features of a head.
        eps: Of the norm.
        device: Of the parameter.
        dtype: Of the parameter.

    Raises:
        ValueError: ``kind`` is none of these.
    """
    if kind is None:
        return None
    if kind == "rms":
        return RMSNorm(head_dim, eps, device, dtype)
    if kind == "l2":
        return UnitNorm(eps)
    raise ValueError(f"qk_norm must be 'rms', 'l2' or None; got {kind!r}")
