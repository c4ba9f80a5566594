"""``zeta doctor``: versions, devices, and which backends run here."""

import argparse
import math
import platform
from typing import Any

import torch
from torch import Tensor

import zeta
from zeta import biases, masks
from zeta.bench.machine import describe_machine, installed_version
from zeta.cli.terminal import heading, row
from zeta.ops.backends.cpu import library
from zeta.ops.precision import float32_precision

DESCRIPTION = """\
Say what Zeta finds on this machine, and try every backend that can run.

"right to 6e-07" means that no number of a backend's output is farther than that from the
reference's, computed in float64; above 1e-04 it is "WRONG by". "FAILED" is an error of the
backend's. After either the exit code is 1."""
OPTIONAL = ("triton", "transformers", "safetensors", "matplotlib", "tqdm", "numpy")
TOLERANCE = 1e-4
"""Largest error of an output of order 1 in float32; a wrong mask or bias makes far larger ones."""


def add_to(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "doctor",
        help="versions, devices, and which backends run here and why others do not",
        description=DESCRIPTION,
        epilog="examples:\n  zeta doctor",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the report.

    Returns:
        0, or 1 where a backend gives a wrong result.
    """
    heading("Versions")
    row("zeta", zeta.__version__)
    row("python", f"{platform.python_version()} on {platform.platform()}")
    row("torch", torch.__version__)
    for package in OPTIONAL:
        row(package, installed_version(package))
    heading("Devices")
    for name, value in describe_machine().items():
        if name not in ("python", "torch", "date"):
            row(name, str(value))
    if not torch.cuda.is_available():
        row("gpu", "none that torch can use")
    _describe_native()
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    verdicts = [_examine(device) for device in devices]
    return 0 if all(verdicts) else 1


def _describe_native() -> None:
    """What the native CPU kernel was built for, what the processor has, and what will run."""
    heading("Native CPU kernel")
    if not library.PATH.exists():
        row("library", f"none: {library.obstacle()}")
        return
    try:
        found = library.load()
    except OSError as error:
        row("library", f"broken: {error}")
        return
    row("library", str(found.path))
    row("built for", ", ".join(found.built) or "nothing")
    row("processor", ", ".join(found.processor) or "none of " + ", ".join(library.INSTRUCTION_SETS))
    runs = found.usable[-1] if found.usable else f"nothing: {library.obstacle()}"
    threads = torch.get_num_threads()
    on = f", on {threads} thread{'s' if threads > 1 else ''}" if found.usable else ""
    row("runs", runs + on)
    of_small_calls = found.used_for(1)
    if of_small_calls not in (None, found.used_for(math.inf)):
        row("small calls", f"{of_small_calls}: wider vectors slow this processor down for a while")
    for name in found.processor:
        if name not in found.built:
            row("", f"the compiler that built it knew no {name}")
    if found.direct is None:
        row("short calls", "take longer: this torch does not offer its tensors to C")
    if "AMX" in found.usable:
        row("float32", f"precision {float32_precision()!r}")


def _examine(device: str) -> bool:
    """Try the backends on a device; return whether all results are right."""
    try:
        return _compare(device)
    except Exception as error:  # Whatever is broken here, the report goes on.
        heading(f"Backends on {device}")
        row("all", _failure(error))
        return False


def _compare(device: str) -> bool:
    """The part of `_examine` that may fail: the device, or the reference on it."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, 4, 64, 32, generator=generator).to(device) for _ in "qkv"]
    table = torch.randn(32, 4, generator=generator).to(device).requires_grad_()
    t5 = biases.Bucketed(table, bidirectional=False)
    calls: dict[str, dict[str, Any]] = {
        "causal": {"mask": masks.Causal()},
        "causal, learned T5 bias": {"mask": masks.Causal(), "bias": t5},
        "causal, learned T5 bias, dropout": {
            "mask": masks.Causal(),
            "bias": t5,
            "dropout_p": 0.1,
            "seed": 1,
        },
    }
    right = True
    for name, call in calls.items():
        heading(f"Backends on {device}: {name}")
        explanation = zeta.explain(*tensors, **call)
        wide = [tensor.double() for tensor in tensors]
        expected = zeta.attention(*wide, backend="reference", **call)
        for backend, reasons in explanation.reasons.items():
            if reasons:
                row(backend, "no: " + reasons[0])
                for reason in reasons[1:]:
                    row("", "    " + reason)
                continue
            verdict, is_right = _try(backend, tensors, call, expected)
            right &= is_right
            row(backend, verdict + (", chosen" if backend == explanation.backend else ""))
    return right


def _try(
    backend: str, tensors: list[Tensor], call: dict[str, Any], expected: Tensor
) -> tuple[str, bool]:
    """What to say of a backend's result, and whether it is right."""
    try:
        out = zeta.attention(*tensors, backend=backend, **call)
    except Exception as error:  # Whatever is broken here, the report goes on.
        return _failure(error), False
    difference = (out.double() - expected).abs().max().item()
    is_right = difference <= TOLERANCE
    return f"{'right to' if is_right else 'WRONG by'} {difference:.0e}", is_right


def _failure(error: Exception) -> str:
    """The kind of an error, and the first line of what it says, if it says anything."""
    return ": ".join(["FAILED", type(error).__name__, *str(error).splitlines()[:1]])
