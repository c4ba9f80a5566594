"""Checks the CPU kernels, then times them against torch: ``python -m benchmarks.cpu``.

Each row is first compared with the reference in float64 on fresh random inputs, with NaN in all
memory that nothing has written yet; a row that fails is not timed. Times are interleaved in one
process; a ratio is the peer's time over ours, of the best and of the medians. Torch's attention can
be bimodal, so that the bars are on the ratio of the bests; they are those of a processor with AMX.

Examples::

    python -m benchmarks.cpu --out benchmarks/results/cpu.json
    python -m benchmarks.cpu --rows "bf16 training,decode"
    python -m benchmarks.cpu --rows "fp32 forward" --isa avx512
    python -m benchmarks.cpu --rows growth --picture docs/growth.png
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import cpu_compiled, cpu_growth, cpu_modules, cpu_rotations, cpu_rows, report
from benchmarks.checking import check
from benchmarks.cpu_problem import Results, Run
from benchmarks.cpu_rows import Row, Work
from zeta.bench import Timing, time_interleaved
from zeta.ops.backends.cpu import library

GROWTH = "growth"
ISAS = {"avx2": "AVX2", "avx512": "AVX-512", "avx512_bf16": "AVX-512 BF16", "amx": "AMX"}


def use_instruction_set(name: str) -> str:
    """Run on one instruction set of the native kernels, or on the best; its name, to be written.

    Raises:
        ValueError: The processor or the build lacks it.
    """
    obstacle = library.obstacle()
    if obstacle is not None:
        if name == "best":
            return f"none: {obstacle}"
        raise ValueError(obstacle)
    native = library.load()
    if name == "best":
        native.instruction_set = 0
        return native.usable[-1]
    wanted = ISAS[name]
    if wanted not in native.usable:
        raise ValueError(f"{wanted} cannot run here, only {', '.join(native.usable)}")
    native.instruction_set = library.INSTRUCTION_SETS.index(wanted) + 1
    return wanted


def all_rows(quick: bool) -> list[Row]:
    """Every row, unmade."""
    shapes = cpu_rows.QUICK_SHAPES if quick else cpu_rows.SHAPES
    return [
        *cpu_rows.attention_rows(shapes),
        *cpu_rows.length_rows(quick),
        *cpu_rows.window_rows(quick),
        *cpu_rows.decode_rows(quick),
        *cpu_rows.small_rows(quick),
        *cpu_rotations.rotation_rows(quick),
        *cpu_compiled.compiled_rows(quick),
        *cpu_modules.small_module_rows(quick),
        *cpu_modules.training_rows(quick),
    ]


def measure(row: Row, rounds: int) -> dict[str, Any]:
    """Check a row, then time it.

    Raises:
        AssertionError: A side is too far from the oracle.
    """
    work = row.make()
    errors = check(work.oracle, work.checked, work.bound, is_peer_rough=work.is_peer_rough)
    found = time_interleaved(_sides(work), rounds=rounds, calls=work.calls)
    ours, peer = found["ours"], found["peer"]
    result = {
        "row": row.name,
        "shape": row.shape,
        "ratio of bests": peer.best / ours.best,
        "ratio of medians": peer.median / ours.median,
        "bar": row.bar,
        "aim": row.aim,
        **{f"{name} ms": _milliseconds(timing) for name, timing in found.items()},
        "errors": errors,
    }
    if work.reads:
        num_bytes = sum(x.numel() * x.element_size() for x in work.reads)
        for name, timing in found.items():
            result[f"{name} GB/s"] = num_bytes / timing.median / 1e9
    return result


def _sides(work: Work) -> dict[str, Run]:
    sides = {"ours": work.ours, "peer": work.peer}
    return sides | ({"read loop": lambda: _read(work.reads)} if work.reads else {})


def _read(tensors: tuple[Tensor, ...]) -> Results:
    """Read every byte once and do next to nothing with it."""
    return {str(n): x.view(torch.int32).amax() for n, x in enumerate(tensors)}


def _milliseconds(timing: Timing) -> dict[str, float]:
    return {"best": timing.best * 1e3, "median": timing.median * 1e3}


def line(result: dict[str, Any]) -> str:
    """One line of the table."""
    bar, best = result["bar"], result["ratio of bests"]
    verdict = "" if bar is None else f"{bar:5.2f} {'ok' if best >= bar else 'BELOW'}"
    more = "".join(f"  {name} {result[name]:.1f}" for name in result if str(name).endswith("GB/s"))
    return (
        f"{result['row']:30} {result['shape']:12} {result['ours ms']['best']:9.3f} "
        f"{result['peer ms']['best']:9.3f} {best:6.2f} {result['ratio of medians']:6.2f} "
        f"{verdict}{more}"
    )


def chosen(rows: list[Row], parts: list[str]) -> list[Row]:
    """The rows whose name and shape contain one of ``parts``."""
    return [row for row in rows if any(part in f"{row.name} {row.shape}" for part in parts)]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default="", help="parts of names, comma between (default: all)")
    parser.add_argument("--quick", action="store_true", help="small shapes and few rounds")
    parser.add_argument("--rounds", type=int, default=9, help="timings of each side (default: 9)")
    parser.add_argument("--isa", choices=("best", *ISAS), default="best")
    parser.add_argument("--seed", type=int, help="of the inputs (default: a fresh one)")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--picture", type=Path, help="draw how cost grows, as PNG")
    arguments = parser.parse_args()
    arguments.rows = [part.strip() for part in arguments.rows.split(",")]
    if len(arguments.rows) > 1 and not all(arguments.rows):
        parser.error("--rows has an empty part, which would be every row")
    arguments.growth = any(part in GROWTH for part in arguments.rows)
    if arguments.picture and not arguments.growth:
        parser.error(f"--picture draws the rows {GROWTH!r}, and these are not among --rows")
    return arguments


def main() -> int:
    arguments = _arguments()
    try:
        kernels = use_instruction_set(arguments.isa)
    except ValueError as error:
        sys.exit(f"benchmarks.cpu: {error}")
    seed = torch.seed() if arguments.seed is None else arguments.seed
    torch.manual_seed(seed)
    todo = chosen(all_rows(arguments.quick), arguments.rows)
    if not todo and not arguments.growth:
        sys.exit(f"benchmarks.cpu: no row contains any of {', '.join(arguments.rows)}")
    machine = report.describe_run("torchscale", "transformers") | {"kernels": kernels, "seed": seed}
    print(report.headline(machine))
    print(f"{'row':30} {'shape':12} {'ours ms':>9} {'peer ms':>9} {'best':>6} {'median':>6}  bar")
    results: dict[str, Any] = {"machine": machine, "rows": [], "growth": [], "failed": []}
    rounds = 2 if arguments.quick else arguments.rounds
    for row in todo:
        try:
            results["rows"].append(measure(row, rounds))
        except (AssertionError, ImportError, RuntimeError) as error:
            results["failed"].append(f"{row.name} {row.shape}: {error}")
            print(f"{row.name:30} {row.shape:12} not timed: {error}", flush=True)
        else:
            print(line(results["rows"][-1]), flush=True)
        report.write(results, arguments.out)
    if arguments.growth:
        for point in cpu_growth.curve(arguments.quick):
            results["growth"].append(point)
            report.write(results, arguments.out)
    if arguments.picture:
        cpu_growth.draw(results["growth"], machine, arguments.picture)
    below = [row for row in results["rows"] if row["bar"] and row["ratio of bests"] < row["bar"]]
    if below:
        print(f"{len(below)} rows are below the bar of a processor with AMX")
    return 1 if results["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
