"""The measuring itself."""

import os
import time

import pytest
import torch

from zeta.bench import describe_machine, peak_bytes, time_interleaved
from zeta.bench.machine import SETTINGS


def test_peak_bytes_counts_what_is_held_at_once() -> None:
    million = torch.zeros(1000, 1000)

    def work() -> None:
        first = million + 1
        second = first * 2
        del first
        _ = second + 1

    # Two results of four million bytes are held at once, never three.
    assert 8_000_000 <= peak_bytes(work) < 8_010_000


@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda", 1)])
def test_peak_bytes_asks_the_gpu_that_is_named(
    device: torch.device | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def answer(name: str, value: int | None) -> None:
        monkeypatch.setattr(torch.cuda, name, lambda of=None: (asked.append(of), value)[1])

    answer("synchronize", None)
    answer("reset_peak_memory_stats", None)
    answer("memory_allocated", 3)
    answer("max_memory_allocated", 10)
    assert peak_bytes(lambda: None, device) == 7
    assert set(asked) == {torch.device(device)}


def test_peak_bytes_knows_no_third_kind_of_device() -> None:
    with pytest.raises(ValueError, match="device must be the CPU or a CUDA device; got meta"):
        peak_bytes(lambda: None, "meta")


def test_interleaved_times_are_of_one_call_and_in_turn() -> None:
    order: list[str] = []

    def slow() -> None:
        order.append("slow")
        time.sleep(0.02)

    found = time_interleaved(
        {"slow": slow, "fast": lambda: order.append("fast")}, rounds=3, warmup=1, calls=2
    )
    assert order == ["slow", "slow", "fast", "fast", "fast", "fast", "slow", "slow"] * 2
    assert len(found["slow"].seconds) == 3
    assert 0.02 <= found["slow"].best <= found["slow"].median < 0.2
    assert found["fast"].best < 0.01


def test_the_machine_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(SETTINGS)]:
        monkeypatch.delenv(name)
    assert "settings" not in describe_machine()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    found = describe_machine()
    assert found["settings"] == "ONEDNN_MAX_CPU_ISA=AVX2"
    assert found["torch"] == torch.__version__
    assert found["processor"]
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert "avx2" in str(found["extensions"]).split()
    assert found["threads"] == torch.get_num_threads()
