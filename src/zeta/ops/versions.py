"""Whether tensors were written to since they were looked at, for what computes with them later."""

from collections.abc import Sequence

from torch import Tensor


def versions_of(tensors: Sequence[Tensor]) -> list[int]:
    """What torch counts of each tensor when it is written to; 0 of those made in inference mode,
    of which it counts nothing.
    """
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def written_to(tensors: Sequence[Tensor], versions: Sequence[int]) -> list[int]:
    """Which of the tensors have not these versions any more."""
    pairs = enumerate(zip(versions_of(tensors), versions, strict=True))
    return [index for index, (now, before) in pairs if now != before]
