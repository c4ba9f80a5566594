"""`Form`: what the keys and values of one cache have in common; and how a device is named there.

Shapes: B batch, G key heads, N new tokens, D head dimension.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zeta.values import check_tensor


class Form(NamedTuple):
    """Sizes, dtype and device of keys ``(B, G, any, D)`` and values ``(B, G, any, Dv)``."""

    batch: int
    heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, key: Tensor, value: Tensor, known: "Form | None" = None) -> "Form":
        """The form of these tokens; ``known``, which a step mostly has, if it is theirs.

        Raises:
            TypeError: One is no tensor.
            ValueError: They are not keys ``(B, G, N, D)`` and values ``(B, G, N, Dv)``, or empty,
                or of two dtypes or devices.
        """
        if known is not None and known._is_of(key, value):
            return known
        check_tensor("key", key)
        check_tensor("value", value)
        k, v = key.shape, value.shape
        if len(k) != 4 or 0 in k:
            raise ValueError(
                f"key must be (batch, key heads, length, head_dim), not empty; got {tuple(k)}"
            )
        if len(v) != 4 or v[:3] != k[:3] or v[3] == 0:
            raise ValueError(
                f"value must be ({k[0]}, {k[1]}, {k[2]}, head_dim), not empty; got {tuple(v)}"
            )
        if value.dtype != key.dtype or value.device != key.device:
            raise ValueError(
                f"value must have the key's dtype and device, {key.dtype} on {key.device}; got "
                f"{value.dtype} on {value.device}"
            )
        return cls(k[0], k[1], k[3], v[3], key.dtype, key.device)

    def _is_of(self, key: Tensor, value: Tensor) -> bool:
        if not (isinstance(key, Tensor) and isinstance(value, Tensor)) or key.dim() != 4:
            return False
        added = key.shape[2]
        return (
            added > 0
            and key.shape == (self.batch, self.heads, added, self.head_dim)
            and value.shape == (self.batch, self.heads, added, self.value_dim)
            and key.dtype == value.dtype == self.dtype
            and key.device == value.device == self.device
        )

    def check(self, new: "Form") -> None:
        """Raise ValueError unless tokens of another form can join those of this one."""
        if new is self or new == self:
            return
        for name, mine, other in (
            ("key", self.head_dim, new.head_dim),
            ("value", self.value_dim, new.value_dim),
        ):
            if (new.batch, new.heads, other) != (self.batch, self.heads, mine):
                raise ValueError(
                    f"{name} must be ({self.batch}, {self.heads}, length, {mine}): batch, key "
                    "heads, length, head_dim, as in the cache; "
                    f"got ({new.batch}, {new.heads}, length, {other})"
                )
        raise ValueError(
            f"key and value must be {self.dtype} on {self.device}, as in the cache; "
            f"got {new.dtype} on {new.device}"
        )


def placed(device: torch.device | str) -> torch.device:
    """A device as tensors on it name theirs: ``"cuda"`` stands for the present GPU, by number."""
    return torch.empty(0, device=device).device


def following(length: int, num_tokens: int, device: torch.device) -> Tensor:
    """Positions ``(1, num_tokens)`` of tokens behind ``length`` others."""
    return torch.arange(length, length + num_tokens, device=device)[None]


def sent(numbers: Sequence[Any], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Numbers as a tensor on a device, which is not waited for."""
    tensor = torch.tensor(numbers, dtype=dtype, device="cpu")
    return tensor.to(device, non_blocking=device.type == "cuda")
