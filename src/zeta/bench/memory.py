"""Peak memory of a piece of work, as torch's allocator sees it."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile


def peak_bytes(work: Callable[[], object], device: torch.device | str | None = None) -> int:
    """The most memory that ``work`` holds at once, beyond what was held before it, in bytes.

    On the CPU every allocation of torch is counted, by its profiler; on a GPU the allocator keeps
    the count itself.

    Args:
        work: What is called, once.
        device: Whose memory counts, the CPU's or a GPU's; the GPU's by default, if there is one.

    Raises:
        ValueError: It is another device.
    """
    default = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(default if device is None else device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        raise ValueError(f"device must be the CPU or a CUDA device; got {device}")
    # Accumulated, though there is one time only: or else torch 2.11 warns that it keeps no more.
    activities = [ProfilerActivity.CPU]
    with profile(activities=activities, profile_memory=True, acc_events=True) as profiled:
        work()
    results = profiled.profiler.kineto_results
    held = peak = 0
    for _, size in sorted(_allocations(results.experimental_event_tree())):
        held += size
        peak = max(peak, held)
    return peak


def _allocations(nodes: list[Any]) -> Iterator[tuple[int, int]]:
    """Time and size of every allocation in a tree of events; a release has a negative size."""
    for node in nodes:
        if node.tag == _EventType.Allocation:
            yield node.start_time_ns, node.extra_fields.alloc_size
        yield from _allocations(node.children)
