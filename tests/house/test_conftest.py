"""The settings that all tests rely on do what they say: planted faults fail."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# One worker makes the report for all.
pytestmark = pytest.mark.xdist_group("planted faults")

PLANTED = """
import warnings
import pytest
import torch

def test_warns():
    warnings.warn("look out")

def test_leaves_the_default_dtype():
    torch.set_default_dtype(torch.float64)

def test_leaves_gradients_off():
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(False)

def test_has_its_own_seed():
    torch.set_grad_enabled(True)
    print("drawn", torch.rand(()).item())

@pytest.mark.xfail
def test_passes_unexpectedly():
    pass

@pytest.mark.gpu
def test_needs_a_gpu():
    torch.zeros((), device="cuda")

def test_is_interpreted():
    import os
    assert torch.cuda.is_available() or os.environ["TRITON_INTERPRET"] == "1"

@pytest.mark.xdist_group("planted")
def test_is_grouped():
    pass
"""


def run(tree: Path, *arguments: str) -> str:
    """Runs the planted tests under this project's settings; returns the report."""
    (tree / "tests").mkdir()
    shutil.copy(ROOT / "pyproject.toml", tree)
    shutil.copy(ROOT / "tests" / "conftest.py", tree / "tests")
    (tree / "tests" / "test_planted.py").write_text(PLANTED, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-p", "no:randomly", "-p", "no:cacheprovider"]
    command += ["-rA", *arguments]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    return done.stdout


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    return run(tmp_path_factory.mktemp("together"))


@pytest.mark.parametrize(
    "line",
    [
        "FAILED tests/test_planted.py::test_warns",
        "ERROR tests/test_planted.py::test_leaves_the_default_dtype",
        "ERROR tests/test_planted.py::test_leaves_gradients_off",
        "FAILED tests/test_planted.py::test_passes_unexpectedly",
        "PASSED tests/test_planted.py::test_has_its_own_seed",
        "PASSED tests/test_planted.py::test_is_interpreted",
    ],
)
def test_planted_faults_fail(report: str, line: str) -> None:
    assert line in report


def test_a_seed_does_not_depend_on_other_tests(report: str, tmp_path: Path) -> None:
    alone = run(tmp_path, "-k", "own_seed")
    drawn = [line for line in alone.splitlines() if line.startswith("drawn ")]
    assert len(drawn) == 1
    assert drawn[0] in report.splitlines()


def test_a_group_stays_with_one_worker(tmp_path: Path) -> None:
    report = run(tmp_path, "-k", "grouped", "--numprocesses", "1", "--dist", "loadgroup")
    assert "PASSED tests/test_planted.py::test_is_grouped@planted" in report


def test_an_unknown_marker_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "test_marker.py"
    path.write_text("import pytest\n\n@pytest.mark.slwo\ndef test(): pass\n", encoding="utf-8")
    assert "'slwo' not found in `markers`" in run(tmp_path, str(path))
