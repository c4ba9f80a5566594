"""The shipped configurations compile for GPUs that need not be there, within their means.

One form of each kernel: ``python -m benchmarks.gpu_resources`` compiles all of them, for minutes.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[3]


def _resources(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs in a process of its own: this one has the kernels for the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_resources", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["80", "86", "90"])
def test_one_form_of_each_kernel_fits(capability: str) -> None:
    done = _resources("--quick", "--capability", capability)
    assert done.returncode == 0, done.stdout + done.stderr
    for kernel in ("forward", "keys", "queries", "band", "diagonals", "split", "merge", "rotation"):
        assert f"{kernel}_kernel" in done.stdout
