"""The rows of the CPU benchmark for short calls compiled by ``torch.compile``: of the op and of
the module, this against its work written by hand.

What a compiled graph does beside attention (guards, its own code) is in both times.
"""

from collections.abc import Callable, Iterator
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cpu_modules import small_module
from benchmarks.cpu_problem import Problem, Results, Run
from benchmarks.cpu_rows import BOUNDS, DTYPES, PLAIN, Row, Work
from zeta import attention

HEADS, LENGTHS = 8, (1, 4, 16, 64)

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
FunctionT = TypeVar("FunctionT", bound=Callable[..., Tensor])


def compiled_rows(quick: bool) -> Iterator[Row]:
    """Short calls, each compiled for its own shape."""
    for dtype in DTYPES:
        for train in (False, True):
            for length in (16,) if quick else LENGTHS:
                # The weights of a single token are 1, and its gradients 0.
                if train and length == 1:
                    continue

                def make(dtype: str = dtype, length: int = length, train: bool = train) -> Work:
                    return _work(DTYPES[dtype], length, train)

                name = f"{dtype} compiled" + (" training" if train else "")
                yield Row(name, f"H {HEADS} T {length}", make, 0.95, None if train else 1.3)
        for length in (16,) if quick else LENGTHS:

            def make_module(dtype: str = dtype, length: int = length) -> Work:
                torch.compiler.reset()
                return small_module(DTYPES[dtype], HEADS, length, _whole)

            yield Row(f"{dtype} compiled module", f"H {HEADS} T {length}", make_module, 0.95, 1.3)


def _work(dtype: torch.dtype, length: int, train: bool) -> Work:
    torch.compiler.reset()
    problem = Problem((1, HEADS, length, 64), dtype, PLAIN, train)
    ours = _compiled(problem, lambda query, key, value: attention(query, key, value))
    peer = _compiled(problem, lambda q, k, v: F.scaled_dot_product_attention(q, k, v))
    checked = {"ours": ours, "peer": peer}
    return Work(ours, peer, problem.oracle, checked, BOUNDS[dtype], calls=20 if train else 50)


def _compiled(problem: Problem, attend: Attend) -> Run:
    compiled = _whole(attend)

    def run() -> Results:
        out = compiled(*problem.leaves.values())
        return {"out": out} | problem.gradients(out, problem.leaves)

    return run


def _whole(function: FunctionT) -> FunctionT:
    return cast(FunctionT, torch.compile(function, fullgraph=True, dynamic=False))
