"""Checks the GPU kernels, then times them: ``python -m benchmarks.gpu [--rows G1,G4] [--quick]``.

Each row is first compared with the reference in float64 on fresh random inputs, with NaN in all
memory that nothing has written yet; a row that fails is not timed. Times are medians by device
events over rotating inputs. A ratio is the other's time over ours.
"""

import argparse
import dataclasses
import json
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from benchmarks import gpu_peers as peers
from benchmarks import tune_gpu
from benchmarks.gpu_peers import Inputs, Problem, Run
from zeta.bench import describe_machine

SHAPES = ((4, 16, 4096), (16, 16, 1024), (8, 16, 2048), (1, 16, 16384))
"""Batch, heads, length: 16,384 tokens each, and the first alone with ``--quick``."""
DIMS = (64, 128)
DECODE = {"G9": (8, 16), "G10": (1,)}
"""Query tokens of a step, which meet a cache with grouped heads."""
DECODE_SHAPES = ((8, 8192), (32, 8192), (1, 32768), (1, 2048), (128, 2048))
"""Batch, keys."""
L2_BYTES = 60 << 20


def problems(row: str, shapes: tuple[tuple[int, int, int], ...]) -> Iterator[Problem]:
    """The calls of a row of the benchmark."""
    variants: dict[str, list[dict[str, Any]]] = {
        "G1": [{"bias": "t5", "causal": causal} for causal in (False, True)],
        "G3": [{"bias": "dense", "causal": False}],
        "G4": [{"bias": "t5", "causal": True, "padded": True}],
        "G5": [{"bias": "t5", "causal": causal, "dropout_p": 0.1} for causal in (False, True)],
        "G6": [
            {"weights": "mean", "causal": causal, "backward": backward}
            for backward in (False, True)
            for causal in (False, True)
        ],
        "G7": [{"weights": "each", "causal": False, "backward": False}],
        "G11": [
            {"causal": causal, "backward": backward}
            for causal in (False, True)
            for backward in (False, True)
        ],
    }
    variants["G12"] = variants["G11"]
    if row in DECODE:
        for batch, length in DECODE_SHAPES[: 2 if len(shapes) == 1 else None]:
            for queries in DECODE[row]:
                yield Problem(
                    batch, 64, length, 128, False, backward=False, queries=queries, key_heads=8
                )
        return
    dims = {"G11": (64,), "G12": (128,)}.get(row, DIMS)
    for (batch, heads, length), dim in ((shape, dim) for dim in dims for shape in shapes):
        for variant in variants[row]:
            if "weights" in variant and batch * heads * length**2 * 8 > 40 << 30:
                continue
            yield Problem(batch, heads, length, dim, **variant)


ROWS = ("G1", "G3", "G4", "G5", "G6", "G7", "G9", "G10", "G11", "G12")


def rivals(problem: Problem, use_flex: bool) -> dict[str, Run]:
    """The peers that compute the same function as ``problem``."""
    if problem.weights:
        compiled = {"compiled eager": peers.eager_weights(problem, True)} if use_flex else {}
        return {"eager": peers.eager_weights(problem, False)} | compiled
    if problem.queries:
        return {"sdpa": peers.sdpa(problem)}
    found: dict[str, Run] = {"sdpa": peers.sdpa(problem)}
    if use_flex and not problem.dropout_p and problem.bias != "dense":
        found["flex"] = peers.flex(problem)
    return found


def results_of(problem: Problem, run: Run, inputs: Inputs) -> list[Tensor]:
    """The output and, of a problem with gradients, those of all leaves."""
    out = run(inputs)
    if not problem.backward:
        return [out.detach()]
    dout = inputs.dout
    if problem.weights:
        generator = torch.Generator("cuda").manual_seed(0)
        dout = torch.rand(out.shape, generator=generator, device="cuda", dtype=torch.float32)
    grads = torch.autograd.grad(out, inputs.leaves(problem), dout.to(out.dtype))
    return [out.detach(), *grads]


def check(problem: Problem) -> str:
    """Compares with float64 in little; the reason why it fails, or nothing."""
    small = problem.smaller()
    inputs = Inputs.of(small)
    wide = Inputs(
        *(
            tensor if tensor is None or not tensor.is_floating_point()
            else tensor.detach().double().requires_grad_(tensor.requires_grad)
            for tensor in (getattr(inputs, field.name) for field in dataclasses.fields(inputs))
        )
    )  # fmt: skip
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        actual = results_of(small, peers.zeta(small), inputs)
        again = results_of(small, peers.zeta(small), inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    expected = results_of(small, peers.zeta(small, "reference"), wide)
    rough = results_of(small, peers.zeta(small, "reference"), inputs)
    for place, (got, same, want, low) in enumerate(
        zip(actual, again, expected, rough, strict=True)
    ):
        error, allowed = (
            ((tensor.double() - want).norm() / want.norm()).item() for tensor in (got, low)
        )
        if not torch.equal(got, same):
            return f"result {place} differs between two runs"
        if not error <= 2 * allowed + 2**-8:
            return f"result {place} is off by {error:.1e}, the reference by {allowed:.1e}"
    return ""


def _graph(step: Callable[[Inputs], object], inputs: Inputs) -> torch.cuda.CUDAGraph:
    step(inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(inputs)
    return graph


def timed(problem: Problem, run: Run, repeats: int, use_graphs: bool) -> dict[str, float]:
    """Median milliseconds and peak memory in MiB, over inputs that do not stay in the cache; as
    Python launches it, or recorded in a CUDA graph.
    """
    size = int(2 * problem.cache_bytes)
    sets = [Inputs.of(problem) for _ in range(max(2, -(-2 * L2_BYTES // size)))]
    if problem.weights and problem.backward:
        gradient = torch.rand_like(run(sets[0]))

        def step(inputs: Inputs) -> object:
            return torch.autograd.grad(run(inputs), inputs.leaves(problem), gradient)
    elif problem.backward:

        def step(inputs: Inputs) -> object:
            leaves = inputs.leaves(problem)
            return torch.autograd.grad(run(inputs), leaves, inputs.dout, allow_unused=True)
    else:

        def step(inputs: Inputs) -> object:
            with torch.no_grad():
                return run(inputs)

    for index in range(3):
        step(sets[index % len(sets)])
    torch.cuda.synchronize()
    if problem.queries or use_graphs:
        # A step is so short that only a graph shows what the device needs for it.
        graphs = {id(inputs): _graph(step, inputs) for inputs in sets}

        def step(inputs: Inputs) -> object:
            return graphs[id(inputs)].replay()  # type: ignore[no-untyped-call]

    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    events = []
    for index in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step(sets[index % len(sets)])
        stop.record()
        events.append((start, stop))
    torch.cuda.synchronize()
    return {
        "ms": statistics.median(start.elapsed_time(stop) for start, stop in events),
        "mib": (torch.cuda.max_memory_allocated() - before) / 2**20,
    }


def measure(
    row: str, problem: Problem, use_flex: bool, repeats: int, use_graphs: bool
) -> dict[str, Any]:
    """One line of the table."""
    entry: dict[str, Any] = {"row": row, "problem": str(problem), "failure": check(problem)}
    if entry["failure"]:
        return entry
    runs: dict[str, Run] = {"zeta": peers.zeta(problem)}
    if not problem.weights and not problem.queries:
        runs["cudnn without extras"] = peers.plain_cudnn(problem)
    if problem.dropout_p:
        runs["zeta without dropout"] = peers.zeta(dataclasses.replace(problem, dropout_p=0.0))
    runs |= rivals(problem, use_flex)
    for name, run in runs.items():
        try:
            entry[name] = timed(problem, run, repeats, use_graphs)
        except Exception as error:  # a peer that cannot: its reason stands in the results
            entry[name] = {"failure": f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"}
            torch.cuda.empty_cache()
    if "ms" in entry["zeta"]:
        entry["tflops"] = problem.flops / entry["zeta"]["ms"] / 1e9
        if problem.queries:
            entry["tbps"] = problem.cache_bytes / entry["zeta"]["ms"] / 1e9
    return entry


def line(entry: dict[str, Any]) -> str:
    """One entry in words and numbers."""
    head = f"{entry['row']:4} {entry['problem']:52}"
    if entry["failure"] or "ms" not in entry["zeta"]:
        return f"{head} FAILED: {entry['failure'] or entry['zeta']['failure']}"
    ours = entry["zeta"]
    rate = f"{entry['tflops']:6.1f} TFLOP/s"
    if "tbps" in entry:
        rate = f"{entry['tbps']:6.2f} TB/s"
    parts = [f"{ours['ms']:8.3f} ms {rate} {ours['mib']:7.0f} MiB"]
    for name, other in entry.items():
        if isinstance(other, dict) and name != "zeta":
            ratio = f"{other['ms'] / ours['ms']:.2f}x" if "ms" in other else "cannot"
            parts.append(f"{name} {ratio}")
    return head + " | ".join(parts)


def warm(arguments: tuple[Problem, bool, list[dict[str, Any]]]) -> None:
    """Compiles what a line needs, in a process of its own; caches on disk keep it."""
    problem, use_flex, tiles = arguments
    tune_gpu.use(tiles)
    variants = [problem, dataclasses.replace(problem, dropout_p=0.0)]
    runs = [peers.zeta(variant) for variant in variants[: 2 if problem.dropout_p else 1]]
    for run in [*runs, *(rivals(problem, True).values() if use_flex else [])]:
        try:
            results_of(problem, run, Inputs.of(problem))
        except Exception as error:  # measured again, and reported, later
            print(f"{problem}: {type(error).__name__}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default=",".join(ROWS), help="such as G1,G4")
    parser.add_argument("--quick", action="store_true", help="one length")
    parser.add_argument(
        "--flex", default="G1,G4,G6", help="rows with compiled peers, which take minutes"
    )
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument(
        "--graphs", action="store_true", help="time the device alone, by CUDA graphs"
    )
    parser.add_argument("--workers", type=int, default=8, help="processes that compile beforehand")
    parser.add_argument("--tiles", type=Path, help="results of benchmarks.tune_gpu to use")
    parser.add_argument("--out", type=Path, help="a JSON file for all numbers")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    tiles = json.loads(options.tiles.read_text()) if options.tiles else []
    tune_gpu.use(tiles)
    shapes = SHAPES[:1] if options.quick else SHAPES
    todo = [(row, p) for row in options.rows.split(",") for p in problems(row, shapes)]
    flexed = set(options.flex.split(","))
    use_flex = [row in flexed and problem.length == SHAPES[0][2] for row, problem in todo]
    context = multiprocessing.get_context("spawn")
    jobs = [(problem, flex, tiles) for (_, problem), flex in zip(todo, use_flex, strict=True)]
    with ProcessPoolExecutor(options.workers, mp_context=context) as pool:
        list(pool.map(warm, jobs))
    report: dict[str, Any] = {
        **describe_machine(),
        "triton": triton.__version__,
        "dtype": "bfloat16",
        "graphs": options.graphs,
        "entries": [],
    }
    print(", ".join(f"{key} {value}" for key, value in report.items() if key != "entries"))
    for (row, problem), flex in zip(todo, use_flex, strict=True):
        entry = measure(row, problem, flex, options.repeats, options.graphs)
        report["entries"].append(entry)
        print(line(entry), flush=True)
        if options.out:
            options.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
