"""Times of several ways to do the same work, interleaved in one process."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping

import torch


@dataclasses.dataclass(frozen=True)
class Timing:
    """Durations of one candidate.

    Attributes:
        seconds: One for each round.
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Of the durations, in seconds."""
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        """The shortest, in seconds."""
        return min(self.seconds)


def time_interleaved(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 9,
    warmup: int = 2,
    calls: int = 1,
) -> dict[str, Timing]:
    """Time candidates in turn, round by round, so that a slow spell of the machine hits all alike.

    Every other round goes backwards: none comes always after the same one, which may have left the
    caches full or the processor hot.

    Args:
        candidates: What to call, by name.
        rounds: How often each is timed.
        warmup: Rounds before, not counted.
        calls: Calls of a candidate in a round; its time is divided by them.

    Returns:
        The durations of one call, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    there = list(candidates.items())
    for turn in range(warmup + rounds):
        for name, candidate in there if turn % 2 == 0 else reversed(there):
            _synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                candidate()
            _synchronize()
            if turn >= warmup:
                seconds[name].append((time.perf_counter() - start) / calls)
    return {name: Timing(tuple(found)) for name, found in seconds.items()}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
