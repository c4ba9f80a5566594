"""Triton's interpreter, without work of its own that changes no result: most of its time."""

import dataclasses
import functools
from typing import Any

from triton import language
from triton.language import core
from triton.runtime import interpreter

_patch_lang = interpreter._patch_lang


@functools.cache
def _languages(function: Any) -> list[Any]:
    """The modules that a function knows Triton's language by."""
    return [module for module in (language, core) if module in function.__globals__.values()]


def _patch_lang_once(function: Any) -> Any:
    """Each function that a kernel calls replaces the language's builtins again; the kernel has."""
    if any(core.is_builtin(module.load) for module in _languages(function)):
        return _patch_lang(function)
    return interpreter._LangPatchScope()


interpreter._patch_lang = _patch_lang_once

# Whether integers overflow is computed beside every sum and product; only debugging looks at it.
_options = interpreter.interpreter_builder.options
if not _options.debug:
    interpreter.interpreter_builder.options = dataclasses.replace(_options, sanitize_overflow=False)


# The type of a tuple, of every shape among them, is made beside it; hardly anything asks for it.
_type_of_tuple = functools.cached_property(lambda self: core._type_for_tuple_values(self.values))
_type_of_tuple.__set_name__(core.tuple, "type")
core.tuple.type = _type_of_tuple
_make_tuple = core.tuple.__init__


def _make_untyped_tuple(self: Any, args: Any, type: Any = None) -> None:
    if type is None:
        self.values = list(args)
    else:
        _make_tuple(self, args, type)


core.tuple.__init__ = _make_untyped_tuple

# The table of dtypes is made anew for every look at it.
_numpy_dtype = functools.cache(interpreter._get_np_dtype)
_pointers = _numpy_dtype(core.uint64)


def _numpy_dtype_of_elements(type: Any) -> Any:
    element = type.scalar
    return _pointers if element.is_ptr() else _numpy_dtype(element)


interpreter._get_np_dtype = _numpy_dtype_of_elements
