"""The native library: found beside this file, loaded at first use, never at import.

A machine without a C++ compiler, or of another kind than x86-64 Linux, has no library; a processor
may lack the instructions. `obstacle` says so.
"""

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from zeta.ops.backends.cpu import layout
from zeta.transforms import constant_in_graphs

PATH = Path(__file__).with_name("libzeta_cpu.so")
INSTRUCTION_SETS = ("AVX2", "AVX-512", "AVX-512 BF16", "AMX")
"""As `ZetaIsa` numbers them, from 1 on. The last usable runs; see `Library.used_for`."""

DONE, NO_MEMORY, NOT_PLAIN = 0, 3, 4
_ANSWERS = {
    1: "it is of another version",
    2: "neither the processor nor the build has the instruction set",
    NO_MEMORY: "there is no memory left",
}

Pass = Callable[[ctypes.Array[ctypes.c_char] | bytes], int]
Direct = Callable[..., Any]


class DirectCalls(NamedTuple):
    """Builtins that take tensors as they are, in the order of ``native/direct.cpp``. They answer as
    passes do, or with `NOT_PLAIN`; those that make tensors return these.
    """

    attend: Direct
    attend_with_lse: Direct
    differentiate: Direct
    project: Direct
    project_heads: Direct
    rotate: Direct


class Library:
    """Entry points of a loaded library.

    Attributes:
        forward, backward, weights, decode: Take a `layout.Record`; return an answer, see `check`.
        direct: None beside a torch that does not offer its tensors to C.
        built, processor, usable: Instruction sets that it has code for, that the processor has,
            and both.
        has_tiles: Whether the processor multiplies matrices (AMX).
    """

    def __init__(self, path: Path) -> None:
        """Load it.

        Raises:
            OSError: The file is no library, or one of another version.
        """
        functions = ctypes.CDLL(str(path))
        size = functions.zeta_abi_bytes
        size.restype = ctypes.c_int64
        if size() != layout.NUM_BYTES:
            raise OSError(
                f"{path} is of another version: its calls have {size()} bytes, "
                f"not {layout.NUM_BYTES}"
            )
        wanted = len(DirectCalls._fields)
        if not hasattr(functions, "zeta_num_builtins") or functions.zeta_num_builtins() != wanted:
            raise OSError(f"{path} is of another version: it has not the same direct calls")
        self.path = path
        self.forward = _pass(functions, "zeta_forward")
        self.backward = _pass(functions, "zeta_backward")
        self.weights = _pass(functions, "zeta_weights")
        self.decode = _pass(functions, "zeta_decode")
        self.direct = _direct(path)
        self.built = _sets(functions, "zeta_built")
        self.processor = _sets(functions, "zeta_processor")
        self.usable = _sets(functions, "zeta_instruction_sets")
        self.has_tiles = INSTRUCTION_SETS[-1] in self.processor
        self._use = functions.zeta_use
        self._use.argtypes, self._use.restype = (ctypes.c_int64,), ctypes.c_int64
        self._used_for = functions.zeta_used_for
        self._used_for.argtypes, self._used_for.restype = (ctypes.c_double,), ctypes.c_int64
        self._instruction_set = 0

    @property
    def instruction_set(self) -> int:
        """The number of the one that runs; 0 for the best of each call.

        Tests and benchmarks set it.

        Raises:
            ValueError: It cannot run here.
        """
        return self._instruction_set

    @instruction_set.setter
    def instruction_set(self, number: int) -> None:
        if not self._use(number):
            raise ValueError(f"instruction set {number} cannot run here, only {self.usable}")
        self._instruction_set = number

    def used_for(self, multiplications: float) -> str | None:
        """The one that a call of so many multiplications runs on; None if none can.

        Few do without AVX-512 on processors that it slows down for a while.
        """
        number: int = self._used_for(multiplications)
        return INSTRUCTION_SETS[number - 1] if number else None

    @property
    def multiplies_tiles(self) -> bool:
        """Whether what runs is made of tiles (AMX)."""
        number = self.instruction_set or len(INSTRUCTION_SETS)
        return number == len(INSTRUCTION_SETS) and INSTRUCTION_SETS[-1] in self.usable


def _pass(functions: ctypes.CDLL, name: str) -> Pass:
    function = getattr(functions, name)
    # An array of char goes as its address.
    function.argtypes, function.restype = (ctypes.c_char_p,), ctypes.c_int64
    return function  # type: ignore[no-any-return]  # ctypes gives functions no type


def _direct(path: Path) -> DirectCalls | None:
    # Called with Python's lock, which the builtins give up while they compute.
    functions = ctypes.PyDLL(str(path))
    meet = functions.zeta_meet_torch
    meet.argtypes, meet.restype = (ctypes.py_object, ctypes.py_object), ctypes.c_int64
    if not meet(Tensor, nn.Parameter):
        return None
    builtin = functions.zeta_builtin
    builtin.argtypes, builtin.restype = (ctypes.c_int64,), ctypes.py_object
    return DirectCalls(*map(builtin, range(len(DirectCalls._fields))))


def _sets(functions: ctypes.CDLL, name: str) -> tuple[str, ...]:
    function = getattr(functions, name)
    function.restype = ctypes.c_int64
    bits = function()
    return tuple(name for bit, name in enumerate(INSTRUCTION_SETS, 1) if bits >> bit & 1)


_TORCH_FUNCTIONS = (
    "aoti_torch_library_init_impl", "torch_library_impl", "torch_call_dispatcher",
    "aoti_torch_check", "torch_get_num_threads", "aoti_torch_get_data_ptr", "aoti_torch_get_dim",
    "aoti_torch_get_sizes", "aoti_torch_get_strides", "aoti_torch_get_dtype",
    "aoti_torch_get_device_type", "aoti_torch_empty_strided", "aoti_torch_delete_tensor_object",
    "torch_list_size", "torch_list_get_item", "torch_delete_list", "aoti_torch_device_type_cpu",
    "aoti_torch_dtype_float32", "aoti_torch_dtype_bfloat16", "aoti_torch_dtype_float16",
    "aoti_torch_dtype_int64", "aoti_torch_dtype_int32", "aoti_torch_dtype_uint8",
)  # fmt: skip
"""Of torch's stable C interface, in the order of ``native/torch.h``."""
_NEWER_FUNCTIONS = ("torch_delete_stable_ivalue", "torch_exception_get_what_without_backtrace")


@functools.cache
def register_operators() -> bool:
    """Give operators kernels that run without Python, those of this name that come later too.

    Returns:
        False where torch does not offer what they need: Python's kernels run.
    """
    try:
        # It is loaded already, wherever it lies.
        torch_library = ctypes.CDLL("libtorch_cpu.so", mode=os.RTLD_NOLOAD)
        required = [_address(torch_library, name) for name in _TORCH_FUNCTIONS]
    except (OSError, AttributeError):
        return False
    newer = [
        _address(torch_library, name) if hasattr(torch_library, name) else None
        for name in _NEWER_FUNCTIONS
    ]
    addresses = (ctypes.c_void_p * (len(required) + len(newer)))(*required, *newer)
    register = ctypes.CDLL(str(PATH)).zeta_register_operators
    register.restype = ctypes.c_int64
    return bool(register(addresses))


def _address(functions: ctypes.CDLL, name: str) -> int | None:
    return ctypes.cast(getattr(functions, name), ctypes.c_void_p).value


def check(answer: int) -> None:
    """Raise what an answer of a pass stands for.

    Raises:
        MemoryError: There was none for scratch.
        RuntimeError: Anything else; a bug.
    """
    if answer == DONE:
        return
    message = f"the native library refuses: {_ANSWERS.get(answer, f'answer {answer}')}"
    raise MemoryError(message) if answer == NO_MEMORY else RuntimeError(message)


def is_done(answer: int) -> bool:
    """Whether a direct call was computed; otherwise it is for the longer way.

    Raises:
        MemoryError, RuntimeError: As `check`.
    """
    if answer == NOT_PLAIN:
        return False
    check(answer)
    return True


@functools.cache
def load() -> Library:
    """The library; the same one each time.

    Raises:
        OSError: It is not there, or cannot be loaded.
    """
    return Library(PATH)


@constant_in_graphs
def obstacle() -> str | None:
    """Why the library cannot run here; None if it can."""
    return _find_obstacle()


@functools.cache
def _find_obstacle() -> str | None:
    if not PATH.exists():
        return (
            "the native library is not built: that takes Linux on x86-64 and a C++ compiler when "
            "Zeta is installed"
        )
    try:
        library = load()
    except OSError as error:
        return f"the native library cannot be loaded: {error}"
    if not library.usable:
        return (
            f"it needs a processor with {' or '.join(library.built)}; "
            f"this one has {', '.join(library.processor) or 'none of them'}"
        )
    return None
