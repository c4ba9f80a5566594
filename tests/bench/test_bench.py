"""The measuring itself."""

import time

import torch

from zeta.bench import describe_machine, peak_bytes, time_interleaved


def test_peak_bytes_counts_what_is_held_at_once() -> None:
    million = torch.zeros(1000, 1000)

    def work() -> None:
        first = million + 1
        second = first * 2
        del first
        _ = second + 1

    # Two results of four million bytes are held at once, never three.
    assert 8_000_000 <= peak_bytes(work) < 8_010_000


def test_interleaved_times_are_of_one_call_and_in_turn() -> None:
    order: list[str] = []

    def slow() -> None:
        order.append("slow")
        time.sleep(0.02)

    found = time_interleaved(
        {"slow": slow, "fast": lambda: order.append("fast")}, rounds=3, warmup=1, calls=2
    )
    assert order == ["slow", "slow", "fast", "fast"] * 4
    assert len(found["slow"].seconds) == 3
    assert 0.02 <= found["slow"].best <= found["slow"].median < 0.2
    assert found["fast"].best < 0.01


def test_the_machine_is_described() -> None:
    found = describe_machine()
    assert found["torch"] == torch.__version__
    assert found["processor"]
    assert found["threads"] == torch.get_num_threads()
