"""The native CPU kernel on an instruction set, with software for what the processor has not.

``make test`` builds a library with that software, in ``build/emulated``.
"""

import shutil
from pathlib import Path

import pytest
import torch

from zeta.ops.backends.cpu import library

EMULATED = Path(__file__).parents[3] / "build" / "emulated" / "libzeta_cpu.so"
_COMPILERS = ("c++", "g++", "clang++")

Pair = tuple[str, torch.dtype]

ALL: list[Pair] = [
    *(("AVX2", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
    *(("AVX-512", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
    ("AVX-512 BF16", torch.bfloat16),
    *(("AMX", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
]
"""The instruction sets, and the dtypes for which they have code of their own: what else they are
given they hand on to another, as test_handing_on.py shows.
"""
FEW_ROWS = [(name, dtype) for name, dtype in ALL if name != "AMX"]
"""Those of queries of a few rows, and of linear layers."""


def on_each(pairs: list[Pair], *dtypes: torch.dtype) -> pytest.MarkDecorator:
    """Parametrise a test by ``dtype`` and the fixture ``unit``; by all dtypes if none are named."""
    chosen = [pair for pair in pairs if not dtypes or pair[1] in dtypes]
    return pytest.mark.parametrize(("unit", "dtype"), chosen, indirect=["unit"], ids=str)


def needs_compiler() -> None:
    """Skip a test where that library cannot be built.

    Raises:
        AssertionError: It could be, and was not.
    """
    if not any(map(shutil.which, _COMPILERS)):
        pytest.skip("there is no C++ compiler to build what has the software")
    assert EMULATED.exists(), "run `make test`, or `make .venv/.ready-emulated`"


def use(name: str, monkeypatch: pytest.MonkeyPatch, *, emulated: bool = False) -> None:
    """Until the test ends, the kernel of eager calls runs on it; in software, too, where the
    processor has it. Operators of compiled graphs stay with the library that they came from.
    """
    native = library.load()
    if emulated or name not in native.usable:
        needs_compiler()
        native = library.Library(EMULATED)
        monkeypatch.setattr(library, "load", lambda: native)
    number = library.INSTRUCTION_SETS.index(name) + 1
    monkeypatch.setattr(native, "instruction_set", number)
