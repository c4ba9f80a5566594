"""The shipped configurations compile for GPUs that need not be there, within their means.

One form of each kernel: ``python -m benchmarks.gpu_resources`` compiles all of them, for minutes.
"""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
hopper = pytest.importorskip("zeta.ops.backends.triton.hopper")
ROOT = Path(__file__).parents[3]


def _resources(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs in a process of its own: this one has the kernels for the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_resources", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_what_may_be_spilled() -> None:
    from benchmarks.gpu_resources import Usage, max_spill

    half, full = torch.bfloat16, torch.float32
    assert max_spill("forward_kernel", 64, half, 90) == 0
    assert max_spill("split_kernel", 128, torch.float16, 90) == 0
    # Measured: those that spill nothing are slower.
    assert 0 < max_spill("keys_kernel", 64, half, 90) < max_spill("keys_kernel", 64, half, 80)
    assert max_spill("keys_kernel", 128, full, 90) < max_spill("keys_kernel", 256, full, 90)
    limit = max_spill("forward_kernel", 64, half, 90)
    usage = Usage("forward_kernel", "", limit, "", 255, 4, 0, serialized=False, by_hand=True)
    assert usage.fault(90) == "4 bytes spilled"
    assert "wait" in dataclasses.replace(usage, spill=0, serialized=True).fault(90)
    assert not dataclasses.replace(usage, spill=0).fault(90)
    assert "shared" in dataclasses.replace(usage, spill=0, shared=1 << 20).fault(90)


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["80", "86", "90", "100"])
def test_one_form_of_each_kernel_fits(capability: str) -> None:
    # Blackwell's assembler takes its time; what has room at 128 features has it at 64.
    dims = "128" if capability == "100" else "64,128"
    done = _resources("--quick", "--capability", capability, "--dims", dims)
    assert done.returncode == 0, done.stdout + done.stderr
    for kernel in ("forward", "keys", "queries", "band", "diagonals", "split", "merge", "rotation"):
        assert f"{kernel}_kernel" in done.stdout
    has_own = capability == "90" and triton.__version__.startswith(hopper.VERSIONS)
    assert ("inputs_kernel" in done.stdout) == has_own
