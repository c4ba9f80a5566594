"""The native kernels touch nothing outside of their buffers, and read nothing before it is written.

Every operand, table, output and gradient lies against an inaccessible page, first with its end and
then with its beginning; memory that nothing has written holds NaN. See guarded_calls.py.
"""

import multiprocessing
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ops.bound import assert_within_bound
from tests.ops.cases import Case
from tests.ops.cpu import guarded_calls, units
from tests.ops.cpu.caches import CACHES, Cache
from tests.ops.cpu.guards import Guards, guarded
from zeta import attention_with_lse, masks
from zeta.ops.backends.cpu import library

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.skipif(
    library.obstacle() is not None, reason=f"no native kernels: {library.obstacle()}"
)


@pytest.mark.slow
@pytest.mark.parametrize("emulated", [False, True], ids=["usable", "emulated"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_nothing_outside_of_a_buffer_is_touched(dtype: str, emulated: bool) -> None:
    command = [sys.executable, "-m", "tests.ops.cpu.guarded_calls", dtype]
    if emulated:
        units.needs_compiler()
        command.append("--emulated")
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    last = found.stdout.splitlines()[-1:]
    assert found.returncode == 0, f"exit {found.returncode} in {last}: {found.stderr}"
    assert last == ["done"]


# What a pass is told wrongly, and in which call.
SPOILT = {
    "forward reads too many keys": ("forward", "source", 1, "long"),
    "forward writes too many rows": ("forward", "target", 1, "long"),
    "forward reads before the queries": ("forward", "query", -4, "long"),
    "backward reads too many keys": ("backward", "source", 1, "long"),
    "weights reads too many keys": ("weights", "source", 1, "plain, weights each"),
    "weights writes too many rows": ("weights", "target", 1, "plain, weights mean"),
    "decode reads too many keys": ("decode", "source", 1, "in one piece"),
    "decode reads too many features": ("decode", "head_dim", 1, "in one piece"),
    "decode reads too many factors": ("decode", "source", 1, "int8"),
    "decode reads before the values": ("decode", "value", -4, "in one piece"),
}


def run_spoilt(kernel: str, field: str, change: int, only: str, names: Path) -> tuple[Any, str]:
    """How a process ends that makes spoilt calls, and the last call's name."""
    # A fork of one that imports for all of them; under the guards' mode, torch's compiler too.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.ops.cpu.guarded_calls", "torch._dynamo"])
    arguments = kernel, field, change, only, names
    process = context.Process(target=guarded_calls.make_spoilt, args=arguments)
    process.start()
    process.join()
    return process.exitcode, names.read_text().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.xdist_group("spoilt calls")
@pytest.mark.parametrize("name", SPOILT)
def test_the_guards_catch(name: str, tmp_path: Path) -> None:
    exit_code, last = run_spoilt(*SPOILT[name], tmp_path / "names")
    assert exit_code in (-signal.SIGSEGV, -signal.SIGBUS)
    assert SPOILT[name][-1] in last


@pytest.mark.slow
@pytest.mark.xdist_group("spoilt calls")
def test_the_guards_catch_nothing_else(tmp_path: Path) -> None:
    exit_code, last = run_spoilt("forward", "source", 0, "long", tmp_path / "names")
    assert exit_code == 0
    assert "long" in last


def test_a_changed_result_is_caught() -> None:
    with pytest.raises(AssertionError, match="out"):
        guarded_calls.compare({"out": torch.tensor([1.0])}, {"out": torch.tensor([1.0000001])})


@pytest.mark.parametrize("at_end", [True, False])
def test_guarded_tensors_keep_values_and_strides(at_end: bool) -> None:
    tensor = torch.randn(3, 5, 7).transpose(0, 1)[1:, :, 2:]
    moved = guarded(tensor, at_end)
    assert torch.equal(moved, tensor)
    assert moved.stride() == tensor.stride()
    row = torch.randn(6).expand(4, 6)
    assert torch.equal(guarded(row, at_end), row)


def test_unwritten_memory_is_nan() -> None:
    with Guards(at_end=True):
        assert torch.empty(5).isnan().all()
        assert torch.empty(5, dtype=torch.bfloat16).isnan().all()
        assert torch.zeros(5).add(1).equal(torch.ones(5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cache", CACHES, ids=lambda cache: cache.name)
def test_caches_are_read_where_they_lie(cache: Cache, dtype: torch.dtype) -> None:
    tensors = cache.tensors(dtype)
    actual = cache.run(tensors)
    oracle, low = (_reference(cache, tensors, kind) for kind in (torch.float64, dtype))
    assert_within_bound(actual, low, oracle)


def _reference(
    cache: Cache, tensors: dict[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    mask: masks.Mask | None = masks.Causal() if cache.causal else None
    if cache.lengths:
        mask = masks.Padding(tensors["padding"])
    operands = (
        tensors["query"].to(dtype),
        cache.plain(tensors, "key").to(dtype),
        cache.plain(tensors, "value").to(dtype),
    )
    out, lse = attention_with_lse(*operands, mask=mask, backend="reference")
    return {"out": out, "lse": lse}


@pytest.mark.parametrize("threads", [1, 2])
def test_long_caches_are_cut_alike_for_any_number_of_threads(threads: int) -> None:
    case = Case("long cache", 1, 4, 1, 2, 3001, 64)
    made = case.tensors(torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = case.run(made, "cpu")
        torch.set_num_threads(threads)
        guarded_calls.compare({"out": case.run(made, "cpu")["out"]}, {"out": expected["out"]})
    finally:
        torch.set_num_threads(before)
