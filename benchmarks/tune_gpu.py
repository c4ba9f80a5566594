"""Searches for better tiles of the portable GPU kernels: ``python -m benchmarks.tune_gpu``.

Every candidate is compiled in a pool of processes, then timed alone on one shape, full and causal,
with a learned offset bias. Prints each kernel's candidates, best first; the table to edit is in
``zeta/ops/backends/triton/configs.py``.
"""

import argparse
import itertools
import json
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from zeta import biases
from zeta.ops.backends.triton import configs

SHIPPED = {kind: dict(widths) for kind, widths in configs.HOPPER.items()}
CANDIDATES: dict[tuple[configs.Pass, int], list[tuple[int, int, int, int]]] = {
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
BUSY_CYCLES = 100_000_000
"""About 50 ms."""


def trial(
    kind: configs.Pass, dim: int, tiles: tuple[int, int, int, int], causal: bool, batch: int,
    heads: int, length: int,
) -> Callable[[], object]:  # fmt: skip
    """A function that launches one kernel with the given tiles."""
    from zeta.ops.backends.triton import gradients, hopper, passes
    from zeta.ops.backends.triton.arguments import Fixed

    hopper.takes = lambda *operands: False  # The portable kernels have the tiles.
    # The table of this process alone is changed, and the other kernels keep theirs.
    for name, widths in SHIPPED.items():
        configs.HOPPER[name] = dict(widths)
    configs.HOPPER[kind][dim] = (configs.Tiles(*tiles), configs.Tiles(*tiles))
    shape = (batch, heads, length, dim)
    query, key, value, dout = (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4)
    )
    table = torch.randn(32, heads, device="cuda")
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


def compile_one(job: tuple[Any, ...]) -> str:
    """Compiles by running on a smaller shape; the compiler's cache on disk serves the timing.

    The heads are those that are timed, and scores are so many that a bias is written out: else
    other kernels would be compiled.
    """
    try:
        trial(*job, BATCH, HEADS, 1024)()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
    return ""


def milliseconds(function: Callable[[], object], repeats: int = 12) -> float:
    """Median by device events, after a warm-up, without the host's time."""
    for _ in range(3):
        function()
    times = []
    # The device is kept busy until all is launched, or it would wait for the host in between.
    torch.cuda._sleep(BUSY_CYCLES)
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        stop.record()
        times.append((start, stop))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in times)


def flops(kind: str, dim: int, causal: bool) -> float:
    """Of the products a kernel makes; those of the band are counted as 0."""
    products = {"forward": 2, "keys": 4, "queries": 3, "band": 0}[kind]
    return products * 2.0 * BATCH * HEADS * LENGTH**2 * dim * (0.5 if causal else 1.0)


def jobs(kinds: list[str], dims: list[int]) -> Iterator[tuple[Any, ...]]:
    for (kind, dim), candidates in CANDIDATES.items():
        if kind in kinds and dim in dims:
            for tiles, causal in itertools.product(candidates, (False, True)):
                yield kind, dim, tiles, causal


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
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, mp_context=context) as pool:
        failures = list(pool.map(compile_one, todo))
    results = []
    for job, failure in zip(todo, failures, strict=True):
        kind, dim, tiles, causal = job
        entry = {"kind": kind, "dim": dim, "tiles": tiles, "causal": causal}
        if failure:
            entry["failure"] = failure
        else:
            entry["ms"] = milliseconds(trial(*job, BATCH, HEADS, LENGTH))
            entry["tflops"] = flops(kind, dim, causal) / entry["ms"] / 1e9
        results.append(entry)
    results.sort(key=lambda e: (e["kind"], e["dim"], e["causal"], e.get("ms", 1e9)))
    for entry in results:
        cost = entry.get("failure") or f"{entry['ms']:8.3f} ms {entry['tflops']:7.1f} TFLOP/s"
        print(
            f"{entry['kind']:8} D{entry['dim']:<4} causal={entry['causal']!s:5} "
            f"{entry['tiles']!s:20} {cost}"
        )
    if options.out:
        options.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    sys.exit(main())
