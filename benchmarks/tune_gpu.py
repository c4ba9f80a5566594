"""Searches for better tiles of the portable GPU kernels: ``python -m benchmarks.tune_gpu``.

Every candidate is compiled in a pool of processes, then those of a kernel are timed in turn on one
shape, full and causal, with a learned offset bias. Prints each kernel's candidates, best first; the
table to edit is in ``zeta/ops/backends/triton/configs.py``.
"""

import argparse
import contextlib
import itertools
import multiprocessing
import statistics
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import write
from zeta import biases
from zeta.ops.backends.triton import configs

Shape = tuple[int, int, int, int]
CANDIDATES: dict[tuple[configs.Pass, int], list[Shape]] = {
    ("forward", 64): [
        (64, 64, 4, 3), (64, 64, 4, 4), (128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2),
        (64, 128, 4, 3),
    ],
    ("forward", 128): [
        (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3), (64, 128, 4, 2), (128, 64, 8, 4),
    ],
    ("keys", 64): [
        (32, 64, 4, 3), (128, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 2), (32, 128, 4, 3),
        (64, 128, 8, 3), (32, 64, 4, 4), (32, 128, 8, 3), (128, 64, 4, 1),
    ],
    ("keys", 128): [
        (32, 64, 4, 3), (32, 128, 8, 3), (64, 128, 8, 2), (64, 128, 8, 1), (64, 64, 4, 2),
        (64, 64, 8, 2), (32, 64, 4, 2), (64, 64, 4, 1), (32, 128, 8, 2), (16, 64, 4, 4),
    ],
    ("queries", 64): [
        (64, 64, 4, 3), (64, 32, 4, 3), (64, 128, 4, 2), (128, 64, 4, 3), (64, 64, 4, 2),
        (128, 64, 8, 3), (64, 32, 4, 4),
    ],
    ("queries", 128): [
        (128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 3),
        (128, 32, 8, 3), (128, 128, 8, 1), (64, 128, 8, 2), (64, 128, 4, 1),
    ],
    ("band", 64): [(64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 1), (128, 64, 4, 1)],
    ("band", 128): [(64, 64, 4, 1), (64, 64, 4, 2), (64, 64, 8, 2), (64, 32, 4, 3)],
}  # fmt: skip
BATCH, HEADS, LENGTH = 4, 16, 4096
BUSY_CYCLES = 20_000_000
"""About 10 ms."""
WARM_UPS = 2

Call = Callable[[], object]
Job = tuple[configs.Pass, int, bool, Shape]
"""A kernel, the width of a head, causal or not, tiles."""


@contextlib.contextmanager
def portable() -> Iterator[None]:
    """For as long, the portable kernels serve all calls."""
    from zeta.ops.backends.triton import hopper

    takes = hopper.takes
    hopper.takes = lambda *operands: False
    try:
        yield
    finally:
        hopper.takes = takes


@portable()
def prepared(kind: configs.Pass, dim: int, causal: bool, length: int) -> Call:
    """A function that launches one kernel."""
    from zeta.ops.backends.triton import gradients, passes
    from zeta.ops.backends.triton.arguments import Fixed

    shape = (BATCH, HEADS, length, dim)
    query, key, value, dout = (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4)
    )
    table = torch.randn(32, HEADS, device="cuda")
    offsets = biases.Bucketed(table, bidirectional=not causal).offset_vector(128).float()
    fixed = Fixed([None] * 9, dim**-0.5, causal, 0, 0.0, False, 0.0)
    if kind == "forward":
        return lambda: passes.forward(query, key, value, offsets, None, fixed)
    out, _, normalisers = passes.forward(query, key, value, offsets, None, fixed)
    given = gradients.of_output(
        dout, None, (query, key, value, out, normalisers), offsets, None, fixed
    )
    if kind == "keys":
        return lambda: gradients.keys_gradient(given)
    if kind == "queries":
        return lambda: gradients.queries_gradient(given, gradients.wanted_sums(given, True))
    far = gradients.queries_gradient(given, gradients.wanted_sums(given, True))[1]
    return lambda: gradients.offsets_gradient(given, far)


@contextlib.contextmanager
def trying(kind: configs.Pass, dim: int, tiles: Shape) -> Iterator[None]:
    """`portable`, with these tiles of one kernel in the table of this process."""
    shipped = configs.HOPPER[kind][dim]
    configs.HOPPER[kind][dim] = (configs.Tiles(*tiles), configs.Tiles(*tiles))
    try:
        with portable():
            yield
    finally:
        configs.HOPPER[kind][dim] = shipped


def compile_all(work: Callable[[Any], str], todo: list[Any], workers: int) -> list[str]:
    """Does all work in a pool of processes, and tells how far it is; the reasons why some failed,
    or nothing.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = [pool.submit(work, job) for job in todo]
        for number, future in enumerate(as_completed(futures), 1):
            print(f"compiled {number} of {len(todo)}", future.result(), flush=True)
    return [future.result() for future in futures]


def compile_one(job: Job) -> str:
    """Compiles by running on a smaller shape; the compiler's cache on disk serves the timing.

    The heads are those that are timed, and scores are so many that a bias is written out: else
    other kernels would be compiled.
    """
    kind, dim, causal, tiles = job
    try:
        trying(kind, dim, tiles)(prepared(kind, dim, causal, 1024))()
        torch.cuda.synchronize()
    except Exception as error:  # it stands in the results
        return told(error)
    return ""


def told(error: Exception) -> str:
    """What kind of an error it is, and the first of its words."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:150]}"


def keep_busy(call: Call) -> None:
    """Gives the device work until a call is launched, or it would wait for the host in between."""
    torch.cuda._sleep(BUSY_CYCLES)


def medians(
    calls: Mapping[Any, Call], rounds: int = 12, lead: Callable[[Call], object] = keep_busy
) -> dict[Any, float]:
    """Median milliseconds by device events. All are called in turn, round by round, forwards and
    backwards, so that neither a slow spell nor who goes before falls on one of them.

    Args:
        calls: What is timed, by name.
        rounds: How often each, after `WARM_UPS` rounds that do not count.
        lead: What goes before a call that is timed, given that call.
    """
    events: dict[Any, list[Any]] = {name: [] for name in calls}
    for number in range(WARM_UPS + rounds):
        for name in list(calls)[:: -1 if number % 2 else 1]:
            lead(calls[name])
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            calls[name]()
            stop.record()
            events[name].append((start, stop))
    torch.cuda.synchronize()
    return {
        name: statistics.median(start.elapsed_time(stop) for start, stop in pairs[WARM_UPS:])
        for name, pairs in events.items()
    }


def flops(kind: str, dim: int, causal: bool) -> float:
    """Of the products a kernel makes; those of the band are counted as 0."""
    products = {"forward": 2, "keys": 4, "queries": 3, "band": 0}[kind]
    return products * 2.0 * BATCH * HEADS * LENGTH**2 * dim * (0.5 if causal else 1.0)


def jobs(kinds: list[str], dims: list[int]) -> Iterator[Job]:
    for (kind, dim), candidates in CANDIDATES.items():
        if kind in kinds and dim in dims:
            for causal, tiles in itertools.product((False, True), candidates):
                yield kind, dim, causal, tiles


def measure(failures: dict[Job, str]) -> list[dict[str, Any]]:
    """Times the candidates of one kernel that could be compiled; all of them, best first.

    Args:
        failures: Why a candidate could not be compiled, or nothing.
    """
    kind, dim, causal, _ = next(iter(failures))
    call = prepared(kind, dim, causal, LENGTH)
    times = medians(
        {
            tiles: trying(kind, dim, tiles)(call)
            for (*_, tiles), failure in failures.items()
            if not failure
        }
    )
    entries = []
    for (*_, tiles), failure in failures.items():
        entry: dict[str, Any] = {"kind": kind, "dim": dim, "tiles": tiles, "causal": causal}
        if failure:
            entry["failure"] = failure
        else:
            entry["ms"] = times[tiles]
            entry["tflops"] = flops(kind, dim, causal) / times[tiles] / 1e9
        entries.append(entry)
    return sorted(entries, key=lambda entry: entry.get("ms", float("inf")))


def use(results: list[dict[str, Any]]) -> None:
    """Puts the fastest tiles of earlier results into the table of this process."""
    for kind, dim in CANDIDATES:
        best = {}
        for causal in (False, True):
            found = [
                entry for entry in results
                if (entry["kind"], entry["dim"], entry["causal"]) == (kind, dim, causal)
                and "ms" in entry
            ]  # fmt: skip
            if found:
                best[causal] = configs.Tiles(*min(found, key=lambda entry: entry["ms"])["tiles"])
        if len(best) == 2:
            configs.HOPPER[kind][dim] = (best[False], best[True])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", default="forward,keys,queries,band")
    parser.add_argument("--dims", default="64,128")
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    todo = list(jobs(options.kinds.split(","), [int(dim) for dim in options.dims.split(",")]))
    failures = dict(zip(todo, compile_all(compile_one, todo, options.workers), strict=True))
    results = []
    for _, candidates in itertools.groupby(todo, key=lambda job: job[:3]):
        for entry in measure({job: failures[job] for job in candidates}):
            results.append(entry)
            cost = entry.get("failure") or f"{entry['ms']:8.3f} ms {entry['tflops']:7.1f} TFLOP/s"
            print(
                f"{entry['kind']:8} D{entry['dim']:<4} causal={entry['causal']!s:5} "
                f"{entry['tiles']!s:20} {cost}",
                flush=True,
            )
        write(results, options.out)


if __name__ == "__main__":
    main()
