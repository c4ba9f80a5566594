"""Launches kernels in the model, from their own source."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import triton.experimental.gluon.language as gl
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tests.ops.triton.gluon_model import language
from tests.ops.triton.gluon_model.device import Device
from tests.ops.triton.gluon_model.values import Block, Pointer
from zeta.ops.backends.triton.kernels.hopper.serving import add_to_global

REPLACED = [
    (tl, language.TRITON),
    (gl, language.GLUON),
    (hopper.mbarrier, language.MBARRIER),
    (hopper.tma, language.TMA),
    (hopper.warpgroup_mma, language.warpgroup_mma),
    (hopper.warpgroup_mma_wait, language.warpgroup_mma_wait),
    (hopper.fence_async_shared, language.fence_async_shared),
    (add_to_global, language.add_to_global),
]


class Model:
    """Kernels as functions of the model, made once."""

    def __init__(self) -> None:
        self.modules: dict[int, dict[str, Any]] = {}

    def function(self, kernel: Any) -> Callable[..., None]:
        """The same function, with names of the model."""
        source: types.FunctionType = kernel.fn
        known = self.names(source.__globals__)
        return types.FunctionType(source.__code__, known, source.__name__, source.__defaults__)

    def names(self, given: dict[str, Any]) -> dict[str, Any]:
        if id(given) not in self.modules:
            made: dict[str, Any] = {}
            self.modules[id(given)] = made
            made.update((name, self.meaning(value)) for name, value in given.items())
        return self.modules[id(given)]

    def meaning(self, value: Any) -> Any:
        for real, model in REPLACED:
            if value is real:
                return model
        if isinstance(value, tl.constexpr):
            return value.value
        return self.function(value) if hasattr(value, "fn") else value

    def launch(
        self, kernel: Any, grid: tuple[int, ...], *operands: Any, seed: int, **constants: Any
    ) -> None:
        del constants["num_warps"]
        assert len(grid) == 1
        function = self.function(kernel)
        given = [argument(operand) for operand in operands]
        Device(seed).run(lambda: function(*given, **constants), grid[0])


def argument(operand: Any) -> Any:
    """What a kernel sees of an operand, as Triton specialises it."""
    if isinstance(operand, Tensor):
        return Pointer(operand, Block(torch.tensor(0, dtype=torch.int64)))
    if isinstance(operand, TensorDescriptor):
        return language.Descriptor(operand)
    if isinstance(operand, tl.constexpr):
        return operand.value
    if isinstance(operand, tuple) and hasattr(operand, "_fields"):
        return type(operand)(*map(argument, operand))
    if isinstance(operand, int) and operand == 1:
        return operand
    if isinstance(operand, int | float):
        dtype = torch.float32 if isinstance(operand, float) else torch.int32
        return Block(torch.tensor(operand, dtype=dtype))
    assert operand is None, f"no argument of a kernel: {operand!r}"
    return None
