"""What every test gets: seeds, threads, and a check on global state.

Where there is no GPU, kernels run in Triton's interpreter.
"""

import os
import random
import zlib
from collections.abc import Iterator

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    # Read when a kernel is defined, so it must stand before anything imports the Triton backend.
    os.environ.setdefault("TRITON_INTERPRET", "1")

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
NUM_THREADS = max(1, (os.cpu_count() or 1) // WORKERS)

# Derandomised: a red run is red for everyone. No deadline: a first call may compile something.
hypothesis.settings.register_profile("zeta", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.load_profile("zeta")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--histories",
        type=int,
        default=2000,
        help="how many random histories of caches to run (default: 2000)",
    )


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(NUM_THREADS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Those that take long begin first, so that no worker is left alone with one at the end.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture
def num_histories(request: pytest.FixtureRequest) -> int:
    """How many random histories of caches to run, all kinds of cache together."""
    return int(request.config.getoption("histories"))


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    """Seeds every generator from the test's own name: the order of the tests changes no number."""
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def _global_state_kept() -> Iterator[None]:
    """Fails a test that leaves torch's global settings other than it found them."""

    def state() -> dict[str, object]:
        return {
            "default dtype": torch.get_default_dtype(),
            "grad enabled": torch.is_grad_enabled(),
            "threads": torch.get_num_threads(),
            "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
            "default device": torch.get_default_device(),
        }

    before = state()
    yield
    assert state() == before
