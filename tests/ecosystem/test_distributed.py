"""DistributedDataParallel and FSDP2 on two processes: the gradients of one process."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.ecosystem import ranks

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("kind", ranks.KINDS)
def test_two_processes_train_as_one(kind: str, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.ecosystem.ranks", kind]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path)], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        for rank in range(ranks.WORLD)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
    found = torch.load(tmp_path / "results.pt")
    expected = ranks.step(ranks.Stack())
    assert found["gradients"].keys() == expected["gradients"].keys()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
