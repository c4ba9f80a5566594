"""How the cost of attention grows with length: time and memory, ours and torch's.

Two kinds of work, forward and backward, of `HEADS` heads of `HEAD_DIM` in bfloat16: causal, which
torch's kernel does in linear memory too, and causal with a learned T5 bias, for which torch needs
the whole of the scores. A length that would take torch more than `MEMORY` is left out on its side.
"""

import ctypes
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.cpu_problem import Features, Problem, Run
from benchmarks.cpu_rows import CAUSAL, T5_CAUSAL
from zeta import plots
from zeta.bench import time_interleaved

HEADS, HEAD_DIM = 2, 64
LENGTHS = tuple(2**n for n in range(7, 17))
QUICK_LENGTHS = LENGTHS[:3]
MEMORY = 8 << 30
WORKS: dict[str, Features] = {"causal": CAUSAL, "causal, T5 bias": T5_CAUSAL}
RESOLUTION = 2**16
"""Of the memory, in bytes."""
SECONDS = 2.0
"""A side that took longer is timed once."""


def curve(quick: bool) -> Iterator[dict[str, Any]]:
    """A point for each work and length, printed as it is found."""
    for name, features in WORKS.items():
        for length in QUICK_LENGTHS if quick else LENGTHS:
            point = _point(name, features, length, quick)
            print(
                f"growth, {name:16} T {length:6} "
                + "  ".join(
                    f"{side} {seconds * 1e3:.1f} ms {point['MiB'][side]:.0f} MiB"
                    for side, seconds in point["seconds"].items()
                ),
                flush=True,
            )
            yield point


def _point(name: str, features: Features, length: int, quick: bool) -> dict[str, Any]:
    problem = Problem((1, HEADS, length, HEAD_DIM), torch.bfloat16, features, train=True)
    sides: dict[str, Run] = {"Zeta": problem.ours}
    # Bias, scores, weights and their gradients, in float32.
    if not features.t5 or 6 * 4 * HEADS * length**2 <= MEMORY:
        sides["torch"] = problem.torch_does()
    seconds = {}
    for side, run in sides.items():
        first = time_interleaved({side: run}, rounds=1, warmup=0)[side].best
        rounds = 2 if quick else max(0, min(9, int(SECONDS / first)))
        again = time_interleaved({side: run}, rounds=rounds, warmup=0)[side].seconds
        seconds[side] = min((first, *again))
    memory = {side: resident_peak_bytes(run) / 2**20 for side, run in sides.items()}
    return {"work": name, "length": length, "seconds": seconds, "MiB": memory}


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
        f"Forward and backward, {HEADS} heads of {HEAD_DIM}, bfloat16, "
        f"{machine['processor']}, {machine['threads']} threads"
    )
    figure = plots.growth(lines, axis="tokens", title=title)
    plots.save(figure, path)
