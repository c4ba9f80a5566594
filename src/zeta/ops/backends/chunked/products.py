"""Matrix products of a block of scores, for grouped heads, by the fastest way the device has.

On the CPU in float32 oneDNN's products are taken, one head at a time, where torch was built with
it: on some processors they run at twice the speed of the BLAS behind `torch.bmm`. Elsewhere
`torch.bmm`, many heads at once.

Shape suffixes: B batch, H query heads, G key heads, R rows of the block (queries), C columns
(keys), D features.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor


@functools.cache
def _onednn_linear() -> Callable[..., Tensor] | None:
    """``linear(input, weight, bias, ...)`` of oneDNN, or None where torch has none."""
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        return torch.ops.mkldnn._linear_pointwise.default
    except AttributeError:
        return None


def prefers_single_heads(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether large blocks go faster head by head than many heads in one batch."""
    return device.type == "cpu" and dtype == torch.float32 and _onednn_linear() is not None


def _by_onednn(left_BHRD: Tensor) -> Callable[..., Tensor] | None:
    single = left_BHRD.shape[0] == 1 and left_BHRD.shape[1] == 1
    if single and prefers_single_heads(left_BHRD.device, left_BHRD.dtype):
        return _onednn_linear()
    return None


def _grouped(tensor_BHRX: Tensor, groups: int) -> Tensor:
    """The query heads of a key head one below the other: ``(B * G, H / G * R, X)``."""
    batch, heads, rows, width = tensor_BHRX.shape
    return tensor_BHRX.reshape(batch * groups, heads // groups * rows, width)


def inner(left_BHRD: Tensor, right_BGCD: Tensor) -> Tensor:
    """Each row of ``left`` times each row of ``right``: contiguous ``(B, H, R, C)``."""
    linear = _by_onednn(left_BHRD)
    if linear is not None:
        # Rows with gaps between them, as of one head among many, would take oneDNN's slowest path.
        right_CD = right_BGCD[0, 0].contiguous()
        return linear(left_BHRD[0, 0], right_CD, None, "none", [], "")[None, None]
    batch, heads, rows, _ = left_BHRD.shape
    groups, columns = right_BGCD.shape[1:3]
    product = torch.bmm(_grouped(left_BHRD, groups), right_BGCD.flatten(0, 1).mT)
    return product.view(batch, heads, rows, columns)


def combine(weights_BHRC: Tensor, columns_BGDC: Tensor) -> Tensor:
    """Sums of columns, weighted by each row of ``weights``: ``(B, H, R, D)``."""
    linear = _by_onednn(weights_BHRC)
    if linear is not None:
        columns_DC = columns_BGDC[0, 0].contiguous()
        return linear(weights_BHRC[0, 0], columns_DC, None, "none", [], "")[None, None]
    batch, heads, rows, _ = weights_BHRC.shape
    groups, width = columns_BGDC.shape[1:3]
    product = torch.bmm(_grouped(weights_BHRC, groups), columns_BGDC.flatten(0, 1).mT)
    return product.view(batch, heads, rows, width)


def combine_rows(weights_BHRC: Tensor, rows_BHRD: Tensor, groups: int) -> Tensor:
    """Sums of rows, weighted by each column, over the heads of a group: ``(B, G, D, C)``."""
    if _by_onednn(weights_BHRC) is not None:
        # A convolution of width one is the product of oneDNN's that takes the weights as they lie.
        image = weights_BHRC[0].transpose(0, 1).unsqueeze(0)
        filters = rows_BHRD[0, 0].T.reshape(rows_BHRD.shape[3], -1, 1, 1)
        product = torch.mkldnn_convolution(image, filters, None, (0, 0), (1, 1), (1, 1), 1)
        return product.transpose(1, 2)
    product = torch.bmm(_grouped(rows_BHRD, groups).mT, _grouped(weights_BHRC, groups))
    return product.view(-1, groups, *product.shape[1:])
