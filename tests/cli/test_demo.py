"""`zeta demo`, run as users run it; one quick run serves most tests."""

import os
import re
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# One worker runs them all: the others would each need a quick run of their own.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("demo")]

TIMED = re.compile(r" in \d+ s|bytes per second|\d ms |MiB|picture is")


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}


def start(*arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "zeta", "demo", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )


def quick_run(output: Path, seed: int) -> str:
    """What a quick run prints; its output folder is new."""
    with start("--quick", "--output", str(output), "--seed", str(seed)) as process:
        out, err = process.communicate()
    assert process.returncode == 0, err
    assert err == ""
    return out


@pytest.fixture(scope="session")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "new" / "folder"


@pytest.fixture(scope="session")
def printed(output: Path) -> str:
    return quick_run(output, seed=3)


def number(printed: str, pattern: str) -> float:
    """The number that stands before a text in the output."""
    found = re.search(rf"^ +([\d.,e-]+) (?:%|ms|MiB)? *{pattern}", printed, flags=re.MULTILINE)
    assert found, pattern
    return float(found[1].replace(",", ""))


def test_language_model_learns(printed: str) -> None:
    assert number(printed, "the model before training") == 8.0
    unigram = number(printed, "unigram")
    assert 3.0 < unigram < 6.0
    assert number(printed, "the model after training") < unigram - 0.5
    assert number(printed, "lzma -9e, what") < number(printed, "lzma -9e, the held-out") < unigram


def test_cached_logits_are_the_full_ones(printed: str) -> None:
    assert number(printed, "largest difference") <= 1e-3
    assert "(agree: limit 1e-03)" in printed
    assert number(printed, "bytes per second with the cache") > 0
    assert number(printed, "bytes per second without") > 0


def test_held_out_numbers_are_written(printed: str) -> None:
    assert number(printed, "of the held-out numbers") > 80.0


def test_picture_is_whole_and_alone(printed: str, output: Path) -> None:
    assert [file.name for file in output.iterdir()] == ["cross-attention.png"]
    assert f"the picture is {output / 'cross-attention.png'}" in printed
    content = (output / "cross-attention.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert content.endswith(b"IEND\xaeB`\x82")
    assert min(struct.unpack(">II", content[16:24])) > 400


def test_step_is_timed_and_explained(printed: str) -> None:
    losses = re.search(r"losses are ([\d.]+) and ([\d.]+)", printed)
    assert losses
    assert float(losses[1]) == pytest.approx(float(losses[2]), abs=1e-5)
    for name in ("Zeta", "the textbook"):
        assert number(printed, f"a step on {name}") > 0
        assert number(printed, f"peak memory of a step on {name}") > 0
    assert re.search(r"^ +\w+ runs: query \(1, 4, 1024, 16\)", printed, flags=re.MULTILINE)


TINY = """
import dataclasses
import sys
from zeta import cli
from zeta.cli import demo

demo.QUICK = dataclasses.replace(
    demo.QUICK, training_bytes=32 << 10, held_out_bytes=2 << 10, steps=12, prompt_bytes=16,
    new_bytes=16, word_steps=8, held_out_numbers=10, step_bytes=128,
)
sys.exit(cli.main())
"""


def test_seed_makes_it_reproducible(tmp_path: Path) -> None:
    def tiny_run(folder: str, seed: int) -> tuple[list[str], bytes]:
        given = ["demo", "--quick", "--output", str(tmp_path / folder), "--seed", str(seed)]
        done = subprocess.run(
            [sys.executable, "-c", TINY, *given],
            capture_output=True,
            text=True,
            check=False,
            env=environment(),
        )
        assert done.returncode == 0, done.stderr
        untimed = [line for line in done.stdout.splitlines() if not TIMED.search(line)]
        return untimed, (tmp_path / folder / "cross-attention.png").read_bytes()

    first, again, other = (tiny_run(*run) for run in (("first", 3), ("again", 3), ("other", 4)))
    assert first == again
    assert first[0] != other[0]
    assert first[1] != other[1]


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_interrupt_ends_cleanly(tmp_path: Path) -> None:
    output = tmp_path / "output"
    # In a shell's background SIGINT is ignored, and a child would inherit that.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = start("--output", str(output))
    finally:
        signal.signal(signal.SIGINT, handler)
    with process:
        assert process.stdout
        for line in process.stdout:
            if line.startswith("  model"):
                break
        assert output.is_dir()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130
    assert err == "zeta demo: interrupted\n"
    assert not output.exists()


def test_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    with start("--quick", "--output", str(tmp_path / "output")) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1
