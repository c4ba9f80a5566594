"""The passes by Hopper's own instructions: the copy engine, and asynchronous products.

In Gluon, an experimental part of Triton that changes from one version to the next: with another
version than those of `VERSIONS`, and on other devices, the portable kernels serve.
"""

import torch
import triton
from torch import Tensor

from zeta.ops.backends.triton.arguments import can_begin, device_capability, is_exact
from zeta.ops.backends.triton.kernels.operands import Score

VERSIONS = ("3.6.",)


def takes(score: Score, query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernels serve.

    A dense bias or mask they do not: its tiles take the registers of the products. Nor what they
    were not yet run with: slopes, a soft cap, explicit positions.
    """
    width = query.shape[-1]
    return (
        device_capability(query) == (9, 0)
        and score.dense is score.keep is score.slopes is score.softcap is score.positions is None
        and can_begin(score)
        and not is_exact(query)
        and value.shape[-1] == width
        and 32 < width <= 128
        and width % 8 == 0
        and all(tensor.numel() > 0 and _can_be_fetched(tensor) for tensor in (query, key, value))
        and triton.__version__.startswith(VERSIONS)
    )


def fetchable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it, as the copy engine can read it."""
    if _can_be_fetched(tensor):
        return tensor
    # Not `contiguous`, which keeps what is dense but begins elsewhere.
    return tensor.clone(memory_format=torch.contiguous_format)


def _can_be_fetched(tensor: Tensor) -> bool:
    """Whether the copy engine can read it: 16 bytes at a time."""
    batch, head, row, _ = tensor.stride()
    steps = batch | head | row
    return tensor.data_ptr() % 16 == 0 and min(batch, head, row) > 0 and steps % 8 == 0
