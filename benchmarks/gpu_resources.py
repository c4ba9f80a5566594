"""Registers, spills and shared memory of every shipped configuration of the GPU kernels.

``python -m benchmarks.gpu_resources [--capability 90] [--dims 64,128] [--quick]`` compiles them for
a GPU that need not be there, and fails where one needs more shared memory than there is, spills
more than `max_spill` allows, or has its asynchronous products serialised by the assembler.
"""

import argparse
import dataclasses
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton.backends.nvidia
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from benchmarks.report import write
from zeta import biases, masks
from zeta.ops.backends.triton import arguments, gradients, hopper, passes, rotation
from zeta.ops.backends.triton.hopper import passes as on_hopper
from zeta.ops.backends.triton.kernels.operands import PageTable
from zeta.ops.call import AttentionCall
from zeta.ops.lowering import lower

SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227}
"""Shared memory that one block may have."""
ALONE = passes.SPLIT_PROGRAMS
"""Of so many key heads each has one program: keys are not split."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

FASTER: dict[tuple[str, int], int] = {
    ("keys_kernel", 64): 52,
    ("keys_kernel", 128): 160,
    ("queries_kernel", 128): 136,
    ("forward_kernel", 128): 88,
    ("inputs_kernel", 64): 1632,
    ("inputs_kernel", 128): 900,
}
"""Bytes a thread that kernels may spill on compute capability 9.0 in half precision, by the width
of a head. Tiles that spill none, or 16 at most, were timed with an offset bias and took longer, by
`results/gpu-tiles-h200.json`: keys at width 64 3 to 7 % (32 x 64) and at 128 about 23 % (16 x 64),
queries at 128 21 to 34 % (128 x 32). Not timed, and spilling none: keys at 128, 32 x 64 by 8 warps.
Hopper's kernel for all three spills in tiles that a mask or a band cuts, and where far offsets are
summed; no form of it that does not was found. Not timed either: forward at 128 and all three at 64
with an offset bias and dropout.
"""
MAX_SPILL = 400
"""The same for float32 on 9.0, whose products are made of three, and half precision elsewhere."""
MAX_SPILL_WIDE = 1024
"""The same for heads wider than 128, and for float32 elsewhere."""


def max_spill(kernel: str, dim: int, dtype: torch.dtype, capability: int) -> int:
    """Bytes a thread that may be spilled. Half precision on compute capability 9.0: none, unless
    that was measured to be faster.
    """
    is_full = dtype == torch.float32
    if dim > 128 or (is_full and capability != 90):
        return MAX_SPILL_WIDE
    if is_full or capability != 90:
        return MAX_SPILL
    return FASTER.get((kernel, dim), 0)


class StubDriver:
    """What the compiler asks of a driver, for a GPU that is not there."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Problem(NamedTuple):
    """A call, and its head_dim and dtype."""

    dim: int
    dtype: torch.dtype
    name: str
    run: Callable[[], object]

    def __str__(self) -> str:
        return f"D{self.dim} {str(self.dtype).removeprefix('torch.')} {self.name}"


@dataclasses.dataclass(frozen=True)
class Usage:
    """What one compiled kernel takes."""

    kernel: str
    problem: str
    max_spill: int
    tiles: str
    registers: int
    spill: int
    shared: int
    serialized: bool
    """Whether products that should be asynchronous wait for each other."""
    by_hand: bool
    """Whether the kernel begins them by hand. What the compiler makes of the portable ones is its
    own affair, and not always better.
    """

    def fault(self, capability: int) -> str:
        """Why it may not ship, or nothing."""
        if self.serialized and self.by_hand:
            return "its products wait for each other"
        if self.shared > SHARED_KIB[capability] * 1024:
            return f"{self.shared} bytes of shared memory"
        return f"{self.spill} bytes spilled" if self.spill > self.max_spill else ""


def assemble(compiled: Any, capability: int) -> tuple[int, int, bool]:
    """Registers, bytes spilled, and whether products that should be asynchronous are not, as the
    assembler reports them.
    """
    folder = Path(triton.backends.nvidia.__file__).parent / "bin"
    assembler = folder / ("ptxas-blackwell" if capability >= 100 else "ptxas")
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "kernel.ptx"
        source.write_text(compiled.asm["ptx"])
        architecture = f"sm_{capability}" + ("a" if capability >= 90 else "")
        arguments_ = [f"--gpu-name={architecture}", "-o", f"{source}.o", str(source)]
        told = subprocess.run(
            [str(assembler), "-v", *arguments_], capture_output=True, text=True, check=True
        ).stderr
    registers, spill = (
        re.search(pattern, told) for pattern in (r"Used (\d+) reg", r"(\d+) bytes spill stores")
    )
    return (
        int(registers[1]) if registers else 0,
        int(spill[1]) if spill else 0,
        "wgmma.mma_async instructions are serialized" in told,
    )


def problems(dims: list[int], quick: bool) -> Iterator[Problem]:
    """Calls that launch every kernel, forward and backward, in each of its main forms."""
    for dim in dims:
        for dtype in (torch.bfloat16,) if quick else DTYPES:
            for name, run in _calls(dim, dtype, quick):
                yield Problem(dim, dtype, name, run)


def _calls(dim: int, dtype: torch.dtype, quick: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    for causal in (True,) if quick else (False, True):
        for bias in ("t5", "dense") if quick else ("", "t5", "dense"):
            for dropout_p in (0.0,) if quick else (0.0, 0.1):
                name = f"causal={causal} {bias} dropout={dropout_p}"
                yield name, _problem(dim, dtype, causal, bias, dropout_p, "output")
    for packed in (16, 128) if quick else (16, 32, 64, 128):
        for bias in ("",) if quick else ("", "t5", "dense"):
            yield f"{packed} packed queries {bias}", _packed(dim, dtype, packed, bias)
        yield f"{packed} packed queries, one split", _packed(dim, dtype, packed, "", ALONE)
        yield f"{packed} packed queries over pages", _pages(dim, dtype, packed)
    if not quick:
        yield "weights", _problem(dim, dtype, True, "t5", 0.0, "mean_weights")
    for interleaved in (True,) if quick else (True, False):
        pairs = "pairs" if interleaved else "halves"
        yield f"rotated {pairs}", _rotation(dim, dtype, interleaved)


def _packed(
    dim: int, dtype: torch.dtype, packed: int, bias: str, batch: int = 2
) -> Callable[[], object]:
    """So many queries of four heads that share their keys."""
    length, heads = 1024, 4
    query = torch.zeros(batch, heads, packed // heads, dim, dtype=dtype)
    key = torch.zeros(1, 1, length, dim, dtype=dtype).expand(batch, -1, -1, -1)
    call = AttentionCall.checked(
        query, key, key, mask=masks.Causal(), bias=_bias(bias, query, length, causal=True)
    )
    lowered = lower(call)
    fixed = arguments.Fixed(*lowered.fixed())
    return lambda: passes.forward(query, key, key, lowered.offsets, lowered.dense, fixed)


def _bias(name: str, query: Tensor, length: int, *, causal: bool) -> biases.Bias | None:
    _, heads, queries, _ = query.shape
    if name == "t5":
        return biases.Bucketed(torch.zeros(32, heads), bidirectional=not causal)
    if name == "dense":
        return biases.Dense(torch.zeros(1, heads, queries, length, dtype=query.dtype))
    return None


def _pages(dim: int, dtype: torch.dtype, packed: int) -> Callable[[], object]:
    """Sequences that differ in length, and of which a window is seen."""
    queries = packed // 4
    query = torch.zeros(2, 8, queries, dim, dtype=dtype)
    key = torch.zeros(2, 2, 1024, dim, dtype=dtype)
    positions = torch.arange(1024).expand(2, -1).contiguous()
    call = AttentionCall.checked(
        query, key, key, mask=masks.SlidingWindow(256), query_positions=positions[:, -queries:],
        key_positions=positions,
    )  # fmt: skip
    lowered = lower(call)
    pages = torch.zeros(128, 16, 2, dim, dtype=dtype).transpose(1, 2)
    numbers = torch.zeros(2, 64, dtype=torch.int32)
    table = PageTable(numbers, 64, 0, tl.constexpr(16))
    fixed = arguments.Fixed(*lowered.fixed())
    return lambda: passes.over_pages(query, key, (pages, pages), table, None, None, fixed)


def _rotation(dim: int, dtype: torch.dtype, interleaved: bool) -> Callable[[], object]:
    """All of a head is turned forward, half of it backward."""
    query, key = (torch.zeros(2, heads, 1024, dim, dtype=dtype) for heads in (8, 2))
    tables = [torch.zeros(1024, dim // 2)] * 4

    def run() -> None:
        rotation.rotation_of(query, key, tables, interleaved, inverse=False)
        half = [table[:, : dim // 4] for table in tables]
        rotation.rotation_of(query, key, half, interleaved, inverse=True)

    return run


def _problem(
    dim: int,
    dtype: torch.dtype,
    causal: bool,
    bias: str,
    dropout_p: float,
    result: Any,
) -> Callable[[], object]:
    length, heads = 1024, 4
    query, key, value = (torch.zeros(2, heads, length, dim, dtype=dtype) for _ in range(3))
    call = AttentionCall.checked(
        query, key, value, mask=masks.Causal() if causal else None,
        bias=_bias(bias, query, length, causal=causal), dropout_p=dropout_p,
        seed=1 if dropout_p else None, result=result,
    )  # fmt: skip
    lowered = lower(call)
    fixed = arguments.Fixed(*lowered.fixed())
    learned = (lowered.offsets, lowered.dense)

    def run() -> None:
        if result == "output":
            out, _, normalisers = passes.forward(query, key, value, *learned, fixed)
            inputs = query, key, value, out, normalisers
            given = gradients.of_output(out, None, inputs, *learned, fixed)
        else:
            out, normalisers = passes.weights(query, key, *learned, True, fixed)
            given = gradients.of_weights(out, query, key, normalisers, *learned, fixed)
        gradients.gradients(given, lowered.dense, bias == "t5", bias == "dense")

    return run


def usages(capability: int, dims: list[int], quick: bool) -> Iterator[Usage]:
    """Compiles every kernel of every problem."""
    driver.set_active(StubDriver(capability))
    found: list[Usage] = []

    def compile_only(kernel: Any, grid: Any, *operands: Any, **constants: Any) -> None:
        compiled = kernel.warmup(*operands, grid=grid, **constants)
        tiles = [constants.get(name) for name in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")]
        registers, spill, serialized = assemble(compiled, capability)
        shared = compiled.metadata.shared
        name = kernel.__name__
        limit = max_spill(name, problem.dim, problem.dtype, capability)
        label = f"{problem}{', portable' if is_portable else ''}"
        usage = Usage(
            name, label, limit, str(tiles), registers, spill, shared, serialized, kernel.is_gluon()
        )
        found.append(usage)

    version = (capability // 10, capability % 10)
    for module in (arguments, passes, gradients, rotation, on_hopper):
        module.launch = compile_only  # type: ignore[attr-defined]
    for module in (arguments, hopper):
        module.device_capability = lambda tensor: version  # type: ignore[attr-defined]
    takes = hopper.takes
    for problem in problems(dims, quick):
        # Where a device has kernels of its own, the portable ones serve what these do not take.
        is_portable = False
        problem.run()
        if any(usage.by_hand for usage in found):
            is_portable = True
            hopper.takes = lambda *operands: False
            problem.run()
            hopper.takes = takes
        yield from found
        found.clear()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--capability", type=int, default=90, choices=sorted(SHARED_KIB))
    parser.add_argument("--dims", default="64,128")
    parser.add_argument("--quick", action="store_true", help="one form of each kernel")
    parser.add_argument("--out", type=Path, help="a JSON file for the table")
    options = parser.parse_args()
    table, faults = [], 0
    for usage in usages(
        options.capability, [int(d) for d in options.dims.split(",")], options.quick
    ):
        fault = usage.fault(options.capability)
        faults += bool(fault)
        table.append(dataclasses.asdict(usage))
        print(
            f"{usage.kernel:20} {usage.problem:48} {usage.tiles:22} {usage.registers:4} registers "
            f"{usage.spill:5} spilled {usage.shared:7} shared {fault and 'FAILS: ' + fault}",
            flush=True,
        )
    write(table, options.out)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
