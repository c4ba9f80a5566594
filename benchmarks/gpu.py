"""Checks the GPU kernels, then times them: ``python -m benchmarks.gpu [--rows G1,G4] [--quick]``.

Whoever is timed is first compared with the reference in float64 on fresh random inputs, Zeta with
NaN in all memory that nothing has written yet; who fails is not timed, and without Zeta nobody is.
Times are medians by device events over rotating inputs, of all in turn. A ratio is the other's time
over ours.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_peers as peers
from benchmarks import tune_gpu
from benchmarks.gpu_peers import Inputs, Maker, Problem, Run, results_of
from benchmarks.report import describe_run, headline, write
from zeta.bench import peak_bytes

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

COMPILED = (peers.zeta, peers.flex, peers.compiled_weights)
"""What is worth making beforehand."""


def candidates(problem: Problem, use_flex: bool) -> dict[str, tuple[Problem, Maker]]:
    """Who is timed, by name: the problem that each computes, and what makes it.

    An easier problem than the row's is that of Zeta without dropout, and of cuDNN without bias,
    padding and dropout, which is the ceiling, not a peer. A peer that is given a dense bias has no
    table to look it up in, nor to give a gradient to.
    """
    found: dict[str, tuple[Problem, Maker]] = {"zeta": (problem, peers.zeta)}
    if problem.weights:
        found["eager"] = (problem, peers.eager_weights)
        if use_flex:
            found["compiled eager"] = (problem, peers.compiled_weights)
        return found
    if not problem.queries:
        plain = dataclasses.replace(problem, bias="", padded=False, dropout_p=0.0)
        found["cudnn without extras"] = (plain, peers.cudnn)
    if problem.dropout_p:
        found["zeta without dropout"] = (dataclasses.replace(problem, dropout_p=0.0), peers.zeta)
    if problem.bias == "t5":
        found["sdpa, bias looked up in its table"] = (problem, peers.sdpa)
        dense = dataclasses.replace(problem, bias="dense")
        found["sdpa, dense bias given"] = (dense, peers.sdpa)
    else:
        found["sdpa"] = (problem, peers.sdpa)
    if use_flex and not problem.dropout_p and not problem.queries and problem.bias != "dense":
        found["flex"] = (problem, peers.flex)
    return found


def check(problem: Problem, make: Maker) -> str:
    """Compares with float64 in little; the reason why it fails, or nothing."""
    small = problem.smaller()
    if make is not peers.zeta:
        # What a rival drops nobody else draws.
        small = dataclasses.replace(small, dropout_p=0.0)
        inputs = Inputs.of(small)
        results = results_of(small, make(small), inputs)
        return peers.fault(results, peers.expected_of(small, inputs), peers.RIVALS)
    inputs = Inputs.of(small)
    with poisoned():
        results, again = (results_of(small, make(small), inputs) for _ in range(2))
    for place, (first, second) in enumerate(zip(results, again, strict=True)):
        if not torch.equal(first, second):
            return f"result {place} differs between two runs"
    return peers.fault(results, peers.expected_of(small, inputs), peers.OURS)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """For as long, NaN is in all memory that nothing has written yet."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


Step = Callable[[], object]


def recorded(
    problem: Problem, run: Run, sets: list[Inputs], turns: Iterator[int], pool: Any
) -> Step:
    """Replays CUDA graphs, one for each of the inputs. All graphs may share a pool of memory, for
    none reads what another has written.
    """
    graphs = []
    for inputs in sets:
        results_of(problem, run, inputs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            results_of(problem, run, inputs)
        # What graphs read must last as long as they do.
        graphs.append((graph, run, inputs))
    return lambda: graphs[next(turns)][0].replay()


def prepare(
    problem: Problem, make: Maker, sets: list[Inputs], turns: Iterator[int],
    pool: Any,
) -> tuple[Step | None, dict[str, Any]]:  # fmt: skip
    """What is timed, and its peak memory in MiB as Python launches it; or, of who fails the check
    or cannot compute the problem, the reason.

    Args:
        turns: Numbers of the inputs to take, for all who are timed: none finds in the cache what
            another has just read.
        pool: Memory for CUDA graphs, if calls are recorded in some.
    """
    try:
        failure = check(problem, make)
        if failure:
            return None, {"failure": failure}
        run = make(problem)

        def step() -> object:
            return results_of(problem, run, sets[next(turns)])

        step()
        mib = peak_bytes(step) / 2**20
        return recorded(problem, run, sets, turns, pool) if pool else step, {"mib": mib}
    except Exception as error:  # who cannot: the reason stands in the results
        return None, {"failure": tune_gpu.told(error)}


def go_before(step: Step) -> None:
    """Goes before a call, uncounted, so that the device finds it as in a loop of such calls."""
    torch.cuda.synchronize()
    step()


def measure(
    row: str, problem: Problem, use_flex: bool, repeats: int, use_graphs: bool
) -> dict[str, Any]:
    """One line of the table."""
    # Of too many shapes the compiler would compile no more, and run the rest as it is.
    torch.compiler.reset()
    entry: dict[str, Any] = {"row": row, "problem": str(problem), "failure": ""}
    found = candidates(problem, use_flex)
    numbers = range(max(2, -(-L2_BYTES // int(problem.cache_bytes))))
    sets = {each: [Inputs.of(each) for _ in numbers] for each, _ in found.values()}
    turns = itertools.cycle(numbers)
    # A step is so short that only a graph shows what the device needs for it.
    use_graphs = use_graphs or bool(problem.queries)
    pool = torch.cuda.graph_pool_handle() if use_graphs else None
    steps = {}
    for name, (each, make) in found.items():
        step, known = prepare(each, make, sets[each], turns, pool)
        if step is not None:
            steps[name] = step
        elif name == "zeta":
            return entry | known
        entry[name] = known
    lead = tune_gpu.keep_busy if use_graphs else go_before
    for name, milliseconds in tune_gpu.medians(steps, repeats, lead).items():
        entry[name]["ms"] = milliseconds
    entry["tflops"] = problem.flops / entry["zeta"]["ms"] / 1e9
    if problem.queries:
        entry["tbps"] = problem.cache_bytes / entry["zeta"]["ms"] / 1e9
    return entry


def line(entry: dict[str, Any]) -> str:
    """One entry in words and numbers."""
    head = f"{entry['row']:4} {entry['problem']:52}"
    if entry["failure"]:
        return f"{head} FAILED: {entry['failure']}"
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


def warm(arguments: tuple[Problem, bool, list[dict[str, Any]]]) -> str:
    """Compiles what a line and its checks need, in a process of its own; caches on disk keep it.
    What failed is tried again, and reported, later.
    """
    problem, use_flex, tiles = arguments
    tune_gpu.use(tiles)
    failures = []
    for name, (each, make) in candidates(problem, use_flex).items():
        try:
            for size in (each.smaller(), each) if make in COMPILED else ():
                results_of(size, make(size), Inputs.of(size))
        except Exception as error:  # of whatever kind, it is not this process that reports it
            failures.append(f"{problem}, {name}: {tune_gpu.told(error)}")
    return "; ".join(failures)


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
    report: dict[str, Any] = {
        **describe_run("triton"),
        "dtype": "bfloat16",
        "graphs": options.graphs,
    }
    print(headline(report), flush=True)
    report["entries"] = []
    jobs = [(problem, flex, tiles) for (_, problem), flex in zip(todo, use_flex, strict=True)]
    tune_gpu.compile_all(warm, jobs, options.workers)
    for (row, problem), flex in zip(todo, use_flex, strict=True):
        entry = measure(row, problem, flex, options.repeats, options.graphs)
        report["entries"].append(entry)
        print(line(entry), flush=True)
        write(report, options.out)


if __name__ == "__main__":
    main()
