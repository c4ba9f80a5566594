"""How the cost of attention grows with length: time and memory, ours and torch's.

Two kinds of work, forward and backward, of `HEADS` heads of `HEAD_DIM`: causal, which torch's
kernel does in linear memory too, and causal with a learned T5 bias, for which torch needs the whole
of the scores. A length that would take torch more than `MEMORY` is left out on its side. In
bfloat16 where the processor multiplies it, for elsewhere torch takes several times as long as in
float32; there in float32.
"""

import ctypes
import multiprocessing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.checking import check
from benchmarks.cpu_problem import Features, Problem, Run, Shape
from benchmarks.cpu_rows import BOUNDS, CAUSAL, DTYPES, T5_CAUSAL
from zeta import plots
from zeta.bench import time_interleaved
from zeta.ops.backends.cpu import library

HEADS, HEAD_DIM = 2, 64
LENGTHS = tuple(2**n for n in range(7, 17))
QUICK_LENGTHS = LENGTHS[:3]
MEMORY = 8 << 30
WORKS: dict[str, Features] = {"causal": CAUSAL, "causal, T5 bias": T5_CAUSAL}
RESOLUTION = 2**16
"""Of the memory, in bytes."""
SECONDS = 4.0
"""Sides that together took longer are timed once."""


def curve(quick: bool) -> Iterator[dict[str, Any]]:
    """A point for each work and length, printed as it is found."""
    for name in WORKS:
        for length in QUICK_LENGTHS if quick else LENGTHS:
            point = _point(name, length, quick)
            print(
                f"growth, {name:16} T {length:6} "
                + "  ".join(
                    f"{side} {seconds * 1e3:.1f} ms {point['MiB'][side]:.0f} MiB"
                    for side, seconds in point["seconds"].items()
                ),
                flush=True,
            )
            yield point


def dtype_name() -> str:
    """That of the curve on this processor."""
    multiplies_pairs = library.obstacle() is None and "AVX-512 BF16" in library.load().usable
    return "bf16" if multiplies_pairs else "fp32"


def _shape(length: int) -> Shape:
    return 1, HEADS, length, HEAD_DIM


def _point(name: str, length: int, quick: bool) -> dict[str, Any]:
    dtype, features = dtype_name(), WORKS[name]
    problem = Problem(_shape(length), DTYPES[dtype], features, train=True)
    checked: dict[str, Run] = {"ours": problem.ours}
    # Bias, scores, weights and their gradients, in float32.
    if not features.t5 or 6 * 4 * HEADS * length**2 <= MEMORY:
        checked["peer"] = problem.torch_does()
    errors = check(problem.oracle, checked, BOUNDS[DTYPES[dtype]])
    sides = dict(zip(("Zeta", "torch"), checked.values(), strict=False))
    first = time_interleaved(sides, rounds=1, warmup=0)
    total = sum(timing.best for timing in first.values())
    rounds = 2 if quick else min(9, int(SECONDS / total))
    found = time_interleaved(sides, rounds=rounds, warmup=0) if rounds else first
    return {
        "work": name,
        "dtype": dtype,
        "length": length,
        "errors": errors,
        "seconds": {side: timing.median for side, timing in found.items()},
        "MiB": {side: _memory(name, length, side) for side in sides},
    }


def _memory(name: str, length: int, side: str) -> float:
    """MiB of a first call of this length, in a process of its own, which keeps no memory."""
    with multiprocessing.get_context("spawn").Pool(1) as process:
        return process.apply(_measure_memory, (name, length, side)) / 2**20


def _measure_memory(name: str, length: int, side: str) -> int:
    runs = []
    for size in (LENGTHS[0], length):  # The first brings in libraries and threads.
        problem = Problem(_shape(size), DTYPES[dtype_name()], WORKS[name], train=True)
        runs.append(problem.ours if side == "Zeta" else problem.torch_does())
    runs[0]()
    return resident_peak_bytes(runs[1])


def resident_peak_bytes(work: Run) -> int:
    """The most memory that the process holds during ``work`` beyond what it held before.

    In bytes, as Linux counts it, so that the kernels' own scratch memory counts too.
    """
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # The peak becomes what is held now.
    before = _status("VmRSS")
    work()
    return max(RESOLUTION, _status("VmHWM") - before)


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) << 10
    raise ValueError(f"/proc/self/status has no {name}")


def draw(points: Sequence[dict[str, Any]], machine: dict[str, Any], path: Path) -> None:
    """The points as a figure, PNG."""
    lines: dict[str, dict[str, list[tuple[float, float]]]] = {"seconds": {}, "MiB": {}}
    for point in points:
        for measured, by_name in lines.items():
            for side, value in point[measured].items():
                by_name.setdefault(f"{side}, {point['work']}", []).append((point["length"], value))
    title = (
        f"Forward and backward, {HEADS} heads of {HEAD_DIM}, {points[0]['dtype']}\n"
        f"{machine['processor']}, {machine['threads']} threads"
    )
    figure = plots.growth(lines, axis="tokens", title=title)
    plots.save(figure, path)
