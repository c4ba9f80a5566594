"""Times of the GPU passes, and cuDNN's, without the host's: ``python -m benchmarks.gpu_kernels``.

Each pass is launched many times over while the device is busy, so that it never waits. Of a whole
call, which may take the host longer to launch than the device to do, `benchmarks.gpu` has the time.
Results are checked there and by ``pytest -m gpu``, not here.
"""

import argparse
import itertools
import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.tune_gpu import milliseconds
from zeta import biases
from zeta.bench import describe_machine

BATCH, HEADS, LENGTH = 4, 16, 4096
Job = tuple[int, bool, str, float]
"""Width of a head, causal or not, "t5" or no bias, dropout."""


def passes_of(job: Job) -> Iterator[tuple[str, Callable[[], object]]]:
    """The passes of a call, by name, each ready to be launched over and over."""
    from zeta.ops.backends.triton import gradients, hopper, passes
    from zeta.ops.backends.triton.arguments import Fixed

    dim, causal, bias, dropout_p = job
    shape = (BATCH, HEADS, LENGTH, dim)
    query, key, value, dout = (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4)
    )
    offsets = None
    if bias:
        table = torch.randn(32, HEADS, device="cuda")
        offsets = biases.Bucketed(table, bidirectional=not causal).offset_vector(128).float()
    seed = torch.tensor(1, device="cuda") if dropout_p else None
    fixed = Fixed([None] * 8 + [seed], dim**-0.5, causal, 0, 0.0, False, dropout_p)

    if not bias and not dropout_p:
        leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]

        def cudnn() -> torch.Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return F.scaled_dot_product_attention(*leaves, is_causal=causal)

        yield "cudnn forward", cudnn
        made = cudnn()
        yield "cudnn backward", lambda: torch.autograd.grad(made, leaves, dout, retain_graph=True)

    def forward() -> tuple[torch.Tensor, ...]:
        return passes.forward(query, key, value, offsets, None, fixed)

    yield "forward", forward
    out, _, statistics = forward()
    inputs = (query, key, value, out, statistics)
    given = gradients.of_output(dout, None, inputs, offsets, None, fixed)
    wanted = gradients.wanted_sums(given, bool(bias))
    if hopper.takes(given.score, query, key, value):
        from zeta.ops.backends.triton.hopper import passes as on_hopper

        yield "inputs", lambda: on_hopper.inputs_gradient(given, wanted)
        takes = hopper.takes
        hopper.takes = lambda *operands: False
        yield "portable forward", forward
        hopper.takes = takes
    yield "portable keys", lambda: gradients.keys_gradient(given)
    yield "portable queries", lambda: gradients.queries_gradient(given, wanted)
    if bias:
        far = gradients.queries_gradient(given, wanted)[1]

        def band() -> torch.Tensor:
            return gradients.offsets_gradient(given, far)

        yield "band", band
        for kernel, run in launches_of(gradients, band):
            yield f"... {kernel}", run


def launches_of(
    module: ModuleType, run: Callable[[], object]
) -> list[tuple[str, Callable[[], object]]]:
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


def draw(report: dict[str, Any], path: Path) -> None:
    """Draws what plain attention and a learned T5 bias take, and cuDNN beside them, as PNG."""
    from matplotlib.figure import Figure

    from zeta import plots

    found = {(e["dim"], e["causal"], e["bias"], e["dropout"]): e["ms"] for e in report["entries"]}
    shapes = sorted({key[:2] for key in found})
    bars = {
        "cuDNN, plain": ("", ("cudnn forward", "cudnn backward")),
        "plain": ("", ("forward", "inputs")),
        "learned T5 bias": ("t5", ("forward", "inputs", "band")),
    }
    figure = Figure(figsize=(7.5, 3.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(bars)
    for place, (name, (bias, parts)) in enumerate(bars.items()):
        bottom = [0.0] * len(shapes)
        for part, opacity in zip(parts, (1.0, 0.65, 0.35), strict=False):
            heights = [found[(*shape, bias, 0.0)][part] for shape in shapes]
            axes.bar(
                [index + place * width for index in range(len(shapes))], heights, width * 0.92,
                bottom=bottom, color=f"C{place}", alpha=opacity,
                label=name if part == parts[0] else None,
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


def compile_one(job: Job) -> None:
    """Compiles by running once; the compiler's cache on disk serves the timing."""
    for _, run in passes_of(job):
        run()
    torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dims", default="64,128")
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--out", type=Path, help="a JSON file for all numbers")
    parser.add_argument("--picture", type=Path, help="draw them, as PNG")
    parser.add_argument("--read", type=Path, help="draw an earlier run's, on any machine")
    options = parser.parse_args()
    if options.read:
        draw(json.loads(options.read.read_text()), options.picture)
        return
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    dims = [int(dim) for dim in options.dims.split(",")]
    jobs = list(itertools.product(dims, (False, True), ("", "t5"), (0.0, 0.1)))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, mp_context=context) as pool:
        list(pool.map(compile_one, jobs))
    entries: list[dict[str, Any]] = []
    for dim, causal, bias, dropout_p in jobs:
        times = {name: milliseconds(run) for name, run in passes_of((dim, causal, bias, dropout_p))}
        entry = {"dim": dim, "causal": causal, "bias": bias, "dropout": dropout_p, "ms": times}
        entries.append(entry)
        print(
            f"D{dim:<4} {'causal' if causal else 'full':7} {bias or 'plain':6} {dropout_p}  "
            + "  ".join(f"{name} {time:.3f}" for name, time in times.items()),
            flush=True,
        )
    report = {**describe_machine(), "triton": triton.__version__, "dtype": "bfloat16"}
    report |= {"batch": BATCH, "heads": HEADS, "length": LENGTH, "entries": entries}
    if options.out:
        options.out.write_text(json.dumps(report, indent=1))
    if options.picture:
        draw(report, options.picture)


if __name__ == "__main__":
    main()
