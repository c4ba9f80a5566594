"""Triton's interpreter, without work of its own that changes no result: most of its time."""

import dataclasses
import functools
import inspect
from typing import Any

from triton.language import core
from triton.runtime import interpreter

_patch_builtin = interpreter._patch_builtin


@functools.cache
def _builtins(package: object) -> tuple[str, ...]:
    """Names of the functions there that the interpreter replaces by its own."""
    return tuple(name for name, member in inspect.getmembers(package) if core.is_builtin(member))


def _patch_builtin_once(package: object, builder: Any, scope: Any) -> None:
    """Each function that a kernel calls looks for them again; the kernel itself found them all."""
    names = _builtins(package)
    if names and core.is_builtin(getattr(package, names[0])):
        _patch_builtin(package, builder, scope)


interpreter._patch_builtin = _patch_builtin_once

# Whether integers overflow is computed beside every sum and product; only debugging looks at it.
_options = interpreter.interpreter_builder.options
if not _options.debug:
    interpreter.interpreter_builder.options = dataclasses.replace(_options, sanitize_overflow=False)
