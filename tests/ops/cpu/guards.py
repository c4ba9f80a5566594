"""Memory with an inaccessible page before and behind it, and a mode that puts all tensors there."""

import ctypes
import mmap
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

PAGE = mmap.PAGESIZE
POISON = 0xFF  # In every byte: a NaN in every floating dtype, -1 in the others.

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def guarded_bytes(size: int, at_end: bool) -> ctypes.Array[ctypes.c_char]:
    """Poisoned memory that nothing may read or write beyond.

    Args:
        size: Bytes, at least one.
        at_end: The last byte lies against an inaccessible page; else the first one does.
    """
    inner = -(-size // PAGE) * PAGE
    whole = inner + 2 * PAGE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    start = _LIBC.mmap(None, whole, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    if start == ctypes.c_void_p(-1).value:
        raise MemoryError(f"mmap of {whole} bytes: errno {ctypes.get_errno()}")
    for guard in (start, start + PAGE + inner):
        if _LIBC.mprotect(guard, PAGE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    ctypes.memset(start + PAGE, POISON, inner)
    place = start + PAGE + (inner - size if at_end else 0)
    block = (ctypes.c_char * size).from_address(place)
    weakref.finalize(block, _LIBC.munmap, start, whole)
    return block


def guarded(tensor: Tensor, at_end: bool, *, is_written: bool = True) -> Tensor:
    """The tensor, with the same strides, in memory of its own that ends where it does.

    Args:
        is_written: False: it is left poisoned, as memory that was only allocated.
    """
    if tensor.numel() == 0:
        return tensor
    spread = zip(tensor.shape, tensor.stride(), strict=True)
    length = 1 + sum((size - 1) * stride for size, stride in spread)
    block = guarded_bytes(length * tensor.element_size(), at_end)
    moved = torch.frombuffer(block, dtype=tensor.dtype).as_strided(tensor.shape, tensor.stride())
    if is_written:
        # Not element by element: a broadcast tensor has several at one address.
        source = tensor.as_strided((length,), (1,), tensor.storage_offset())
        moved.as_strided((length,), (1,)).copy_(source)
    return moved


class Guards(TorchDispatchMode):
    """Every tensor that an operator makes lies in guarded memory; an unwritten one is poisoned."""

    def __init__(self, at_end: bool) -> None:
        super().__init__()
        self.at_end = at_end

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        leaves = tree_flatten((args, kwargs))[0]
        given = {_storage(leaf) for leaf in leaves if isinstance(leaf, Tensor)}
        is_written = "empty" not in str(func)

        def moved(tensor: Tensor) -> Tensor:
            if tensor.device.type != "cpu" or _storage(tensor) in given:
                return tensor
            return guarded(tensor, self.at_end, is_written=is_written)

        return tree_map_only(Tensor, moved, result)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
