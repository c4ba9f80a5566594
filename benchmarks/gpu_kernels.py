"""Times of the GPU passes, and cuDNN's, without the host's: ``python -m benchmarks.gpu_kernels``.

The passes of a row are launched in turn while the device is busy, so that it never waits. Of whole
calls, which may take the host longer to launch than the device to do, `benchmarks.gpu` has the
times. Ours and cuDNN's passes are first compared with the reference in float64, on fewer and
shorter sequences; who fails is not timed.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import gpu_peers as peers
from benchmarks.gpu_peers import Inputs, Problem
from benchmarks.report import describe_run, write
from benchmarks.tune_gpu import compile_all, medians, portable, told
from zeta import biases

BATCH, HEADS, LENGTH = 4, 16, 4096


class Pass(NamedTuple):
    """A pass of a call.

    Attributes:
        run: Launches it.
        places: Which of `gpu_peers.results_of` it gives; none, if it is checked with another.
        read: Finds them in what `run` returns.
    """

    name: str
    run: Callable[[], Any]
    places: Sequence[int] = ()
    read: Callable[[Any], Sequence[torch.Tensor]] = tuple


def cudnn_passes(problem: Problem, inputs: Inputs) -> Iterator[Pass]:
    """cuDNN's, where it computes the same."""
    if problem.bias or problem.dropout_p:
        return
    leaves = inputs.leaves(problem)
    query, key, value = leaves

    def forward() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(query, key, value, is_causal=problem.causal)

    yield Pass("cudnn forward", forward, [0], lambda out: [out])
    made = forward()

    def backward() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(made, leaves, inputs.dout, retain_graph=True)

    yield Pass("cudnn backward", backward, [1, 2, 3])


def own_passes(problem: Problem, inputs: Inputs) -> Iterator[Pass]:
    """Ours: portable ones, and Hopper's where they serve."""
    from zeta.ops.backends.triton import gradients, hopper, passes
    from zeta.ops.backends.triton.arguments import Fixed

    operands = inputs.query.detach(), inputs.key.detach(), inputs.value.detach()
    vector = offsets = None
    if problem.bias:
        bias = biases.Bucketed(inputs.table, bidirectional=not problem.causal)
        vector = bias.offset_vector(128)
        offsets = vector.detach()
    seed = torch.tensor(1, device="cuda") if problem.dropout_p else None
    scale = problem.dim**-0.5
    fixed = Fixed([None] * 8 + [seed], scale, problem.causal, 0, 0.0, False, problem.dropout_p)

    def forward() -> tuple[torch.Tensor, ...]:
        return passes.forward(*operands, offsets, None, fixed)

    yield Pass("forward", forward, [0], lambda made: made[:1])
    out, _, statistics = forward()
    saved = (*operands, out, statistics)
    ((_, delta),) = launches_of(
        gradients, lambda: gradients.of_output(inputs.dout, None, saved, offsets, None, fixed)
    )
    yield Pass("delta", delta)
    given = gradients.of_output(inputs.dout, None, saved, offsets, None, fixed)
    wanted = gradients.wanted_sums(given, bool(problem.bias))
    if hopper.takes(given.score, *operands):
        from zeta.ops.backends.triton.hopper import passes as on_hopper

        def inputs_gradient() -> Any:
            return on_hopper.inputs_gradient(given, wanted)

        yield Pass("inputs", inputs_gradient, [1, 2, 3], lambda made: made[0])
        yield Pass("portable forward", portable()(forward), [0], lambda made: made[:1])
    yield Pass("portable keys", lambda: gradients.keys_gradient(given), [2, 3])
    yield Pass(
        "portable queries", lambda: gradients.queries_gradient(given, wanted), [1],
        lambda made: made[:1],
    )  # fmt: skip
    if vector is not None:
        far = gradients.queries_gradient(given, wanted)[1]

        def band() -> torch.Tensor:
            return gradients.offsets_gradient(given, far)

        yield Pass(
            "band", band, [4],
            lambda made: torch.autograd.grad(vector, inputs.table, made, retain_graph=True),
        )  # fmt: skip
        for kernel, run in launches_of(gradients, band):
            yield Pass(f"... {kernel}", run)


def launches_of(module: Any, run: Callable[[], object]) -> list[tuple[str, Callable[[], object]]]:
    """The kernels that a pass launches from a module, by name, each ready to be launched alone."""
    launched: list[tuple[str, Callable[[], object]]] = []
    launch = module.launch

    def note(kernel: Any, *operands: Any, **constants: Any) -> None:
        launched.append((kernel.__name__, lambda: launch(kernel, *operands, **constants)))
        launch(kernel, *operands, **constants)

    module.launch = note
    try:
        run()
    finally:
        module.launch = launch
    return launched


Passes = Callable[[Problem, Inputs], Iterator[Pass]]
SIDES: dict[str, tuple[Passes, float]] = {
    "zeta": (own_passes, peers.OURS),
    "cudnn": (cudnn_passes, peers.RIVALS),
}
"""Passes, and by how much they may be off."""


def check(problem: Problem, passes: Passes, margin: float) -> str:
    """Compares the results of all passes with float64; the reason why one fails, or nothing."""
    inputs = Inputs.of(problem)
    expected = peers.expected_of(problem, inputs)
    for each in passes(problem, inputs):
        if each.places:
            results = each.read(each.run())
            reason = peers.fault(results, [expected[place] for place in each.places], margin)
            if reason:
                return f"{each.name}: {reason}"
    return ""


def parts_of(ms: dict[str, float]) -> tuple[float, float, float]:
    """What a call of ours takes, 0 where it was not timed: forward, gradients of the inputs, and
    gradient of the table.
    """
    gradients = ("inputs",) if "inputs" in ms else ("portable keys", "portable queries")
    parts = (("forward",), ("delta", *gradients), ("band",))
    forward, inputs, table = (sum(ms.get(name, 0.0) for name in names) for names in parts)
    return forward, inputs, table


def cudnn_parts_of(ms: dict[str, float]) -> tuple[float, float, float]:
    """The same of cuDNN's."""
    return ms.get("cudnn forward", 0.0), ms.get("cudnn backward", 0.0), 0.0


def measure(problem: Problem) -> dict[str, Any]:
    """One row: the passes of those who pass the check, in turn."""
    runs: dict[str, Callable[[], Any]] = {}
    failures: dict[str, str] = {}
    inputs = Inputs.of(problem)
    for side, (passes, margin) in SIDES.items():
        try:
            reason = check(problem.smaller(), passes, margin)
            found = {} if reason else {each.name: each.run for each in passes(problem, inputs)}
        except Exception as error:  # who cannot: the reason stands in the results
            reason, found = told(error), {}
        runs |= found
        failures |= {side: reason} if reason else {}
    ms = medians(runs)
    return {
        "dim": problem.dim, "causal": problem.causal, "bias": problem.bias,
        "dropout": problem.dropout_p, "failures": failures, "ms": ms,
        "sums": {"zeta": sum(parts_of(ms)), "cudnn": sum(cudnn_parts_of(ms))},
    }  # fmt: skip


def draw(report: dict[str, Any], path: Path) -> None:
    """Draws what plain attention and a learned T5 bias take, and cuDNN beside them, as PNG."""
    from matplotlib.figure import Figure

    from zeta import plots

    found = {(e["dim"], e["causal"], e["bias"], e["dropout"]): e["ms"] for e in report["entries"]}
    shapes = sorted({key[:2] for key in found})
    bars = {
        "cuDNN, plain": ("", cudnn_parts_of),
        "plain": ("", parts_of),
        "learned T5 bias": ("t5", parts_of),
    }
    figure = Figure(figsize=(7.5, 3.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(bars)
    for place, (name, (bias, parts)) in enumerate(bars.items()):
        bottom = [0.0] * len(shapes)
        stacks = zip(*(parts(found[(*shape, bias, 0.0)]) for shape in shapes), strict=True)
        for heights, opacity in zip(stacks, (1.0, 0.65, 0.35), strict=True):
            axes.bar(
                [index + place * width for index in range(len(shapes))], heights, width * 0.92,
                bottom=bottom, color=f"C{place}", alpha=opacity,
                label=name if opacity == 1.0 else None,
            )  # fmt: skip
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    labels = [f"D {dim}, {'causal' if causal else 'full'}" for dim, causal in shapes]
    axes.set_xticks([index + width for index in range(len(shapes))], labels)
    axes.set_ylabel("ms")
    axes.set_title(
        f"{report['gpu']}: forward (dark), gradients of the inputs, gradient of the table (light)",
        fontsize=10,
    )
    axes.legend(frameon=False)
    plots.save(figure, path)


def line(problem: Problem, entry: dict[str, Any]) -> str:
    """One row in words and numbers."""
    parts = [f"{name} FAILED: {reason}" for name, reason in entry["failures"].items()]
    parts += [f"{name} {time:.3f}" for name, time in entry["ms"].items()]
    parts += [f"all of {side} {time:.3f}" for side, time in entry["sums"].items() if time]
    return "  ".join([str(problem), *parts])


def compile_one(problem: Problem) -> str:
    """Compiles ours by running once; the compiler's cache on disk serves the timing."""
    try:
        for size in (problem.smaller(), problem):
            for each in own_passes(size, Inputs.of(size)):
                each.run()
        torch.cuda.synchronize()
    except Exception as error:  # tried again, and reported, by the timing
        return f"{problem}: {told(error)}"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dims", default="64,128")
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--out", type=Path, help="a JSON file for all numbers")
    parser.add_argument("--picture", type=Path, help="draw them, as PNG")
    parser.add_argument("--read", type=Path, help="draw an earlier run's, on any machine")
    options = parser.parse_args()
    if options.read:
        if not options.picture:
            parser.error("--read needs --picture")
        draw(json.loads(options.read.read_text()), options.picture)
        return
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    dims = [int(dim) for dim in options.dims.split(",")]
    problems = [
        Problem(BATCH, HEADS, LENGTH, dim, causal, bias, dropout_p=dropout_p)
        for dim, causal, bias, dropout_p in itertools.product(
            dims, (False, True), ("", "t5"), (0.0, 0.1)
        )
    ]
    compile_all(compile_one, problems, options.workers)
    report: dict[str, Any] = {
        **describe_run("triton"),
        "dtype": "bfloat16",
        "batch": BATCH,
        "heads": HEADS,
        "length": LENGTH,
        "entries": [],
    }
    for problem in problems:
        entry = measure(problem)
        report["entries"].append(entry)
        print(line(problem, entry), flush=True)
        write(report, options.out)
    if options.picture:
        draw(report, options.picture)


if __name__ == "__main__":
    main()
