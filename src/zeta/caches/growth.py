"""Tensors that grow at the end without being copied at every step.

`append` is ``torch.cat`` to its caller: no tensor that it was given or has given back ever changes.
Behind a tensor that it made there is room, though, and whoever first appends to that tensor gets
the room; another who appends to the same tensor, or to a part of it, gets a copy. So a state can be
kept, shared and returned to for nothing.

Shapes: B batch, G key heads, N new tokens, L all tokens so far.
"""

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from zeta.transforms import is_traced

_MIN_ROOM = 64
_TAIL = "_zeta_tail"


class _Tail:
    """Who owns the room behind a tensor.

    Attributes:
        buffer: ``(B, G, C, ...)``, through which is written. The tensors given out are views of an
            alias with a version counter of its own, since writing behind their end changes none of
            them.
        filled: Tokens of the buffer that somebody may be reading.
    """

    __slots__ = ("buffer", "filled")

    def __init__(self, buffer: Tensor, filled: int) -> None:
        self.buffer = buffer
        self.filled = filled


def append(before: Tensor | None, new: Tensor) -> Tensor:
    """Join along dimension 2, in a time that depends on the new tokens alone, doublings apart.

    Args:
        before: ``(B, G, L - N, ...)``, or None. Any tensor; one from here has room.
        new: ``(B, G, N, ...)`` of the same dtype and device.

    Returns:
        ``(B, G, L, ...)``. It is differentiable if one of the two requires a gradient; then, under
        ``torch.compile`` and inside of transforms it is a plain copy.
    """
    if _is_followed(before, new):
        return new if before is None else torch.cat((before, new), dim=2)
    length = 0 if before is None else before.shape[2]
    total = length + new.shape[2]
    tail = None if before is None else _tail_of(before)
    if before is None or tail is None or tail.filled != length or total > tail.buffer.shape[2]:
        shown, tail = _with_room(new, total)
        if before is not None:
            tail.buffer.narrow(2, 0, length).copy_(before)
    else:
        shown = _base(before)
    tail.buffer.narrow(2, length, total - length).copy_(new)
    tail.filled = total
    return shown.narrow(2, 0, total)


def is_copy(before: Tensor, grown: Tensor) -> bool:
    """Whether `append` has copied ``before`` to other memory, where it could as well be read."""
    if torch.compiler.is_compiling() or before.requires_grad:
        return False
    return grown._base is not None and grown._base is not before._base


def take(tensor: Tensor, index: Tensor) -> Tensor:
    """``tensor.index_select(0, index)``, with room behind it."""
    if _is_followed(tensor):
        return tensor.index_select(0, index)
    length = tensor.shape[2]
    shown, tail = _with_room(tensor, length, len(index))
    torch.index_select(tensor, 0, index, out=tail.buffer.narrow(2, 0, length))
    tail.filled = length
    return shown.narrow(2, 0, length)


def reclaim(tensor: Tensor, length: int) -> None:
    """Let whoever appends to the first ``length`` tokens of ``tensor`` write over the others.

    For an owner who knows that nobody needs them. Tensors that show them count as changed.
    """
    tail = _tail_of(tensor)
    if tail is not None and tail.filled > length:
        tail.filled = length
        increment_version(_base(tensor))


def nbytes(tensor: Tensor) -> int:
    """Bytes of a tensor and of the room behind it."""
    tail = _tail_of(tensor)
    return tensor.nbytes if tail is None else tail.buffer.nbytes


def _is_followed(*tensors: Tensor | None) -> bool:
    """Whether something follows what becomes of them, and must find no writing into a buffer."""
    if is_traced():
        return True
    return torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    )


def _with_room(like: Tensor, length: int, batch: int | None = None) -> tuple[Tensor, _Tail]:
    """A new buffer with room for more than ``length`` tokens: the alias that is shown, and its
    tail."""
    room = max(_MIN_ROOM, 1 << length.bit_length())
    # Nothing could be written to a tensor of inference mode outside of it.
    with torch.inference_mode(False):
        shape = (batch or like.shape[0], like.shape[1], room, *like.shape[3:])
        buffer = torch.empty(shape, dtype=like.dtype, device=like.device)
        shown = buffer.data
    tail = _Tail(buffer, 0)
    setattr(shown, _TAIL, tail)
    return shown, tail


def _base(tensor: Tensor) -> Tensor:
    base: Tensor | None = tensor._base
    assert base is not None
    return base


def _tail_of(tensor: Tensor) -> _Tail | None:
    """The tail of a tensor that begins a buffer; None for any other."""
    tail: _Tail | None = getattr(tensor._base, _TAIL, None)
    if tail is None or tensor.storage_offset() or tensor.stride() != tail.buffer.stride():
        return None
    same = tensor.shape[:2] == tail.buffer.shape[:2] and tensor.shape[3:] == tail.buffer.shape[3:]
    return tail if same else None
