"""Shared memory, barriers, and a check that every access to the one is ordered by the others.

Each agent has a clock: a worker, the engine that multiplies and sends for it, and each copy that
was begun. Barriers carry what their callers knew. Of every element of shared memory it is kept who
wrote it, and who read it, when; whoever comes next must know of that (vector clocks, as in
FastTrack, PLDI 2009). Beside that, what a worker wrote is seen by engines only after a fence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor

READERS = 10
"""Agents of a program at most, but for those that only write: copies that were begun."""
COPIES = 23
"""A copy is in no order with those that were begun less than so many before it."""
AGENTS = READERS + COPIES
WRITTEN, READ = 0, 1
"""Planes of the trace of an element: when it was written, and by whom; when each agent read it."""


class RaceError(Exception):
    """Two accesses to shared memory, or two arrivals at a barrier, that nothing orders."""


class Agent:
    """Who reads and writes: `clock` says of each agent what this one knows of it."""

    def __init__(self, number: int, name: str, *, engine: bool = False) -> None:
        self.number, self.name, self.engine = number, name, engine
        self.clock = torch.zeros(AGENTS, dtype=torch.int32)
        self.fenced = 0
        """The time up to which engines see what it wrote."""
        self.now = 0

    def tick(self) -> int:
        self.now += 1
        self.clock[self.number] = self.now
        return self.now

    def learn(self, clock: Tensor) -> None:
        torch.maximum(self.clock, clock, out=self.clock)

    def fence(self) -> None:
        self.fenced = self.now

    def stand_at(self, clock: Tensor) -> None:
        """Goes on after its own work, and after what is known at that clock: no more."""
        self.clock = clock.clone()
        self.clock[self.number] = self.now


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all expected bytes have."""

    def __init__(self) -> None:
        self.count = self.missing = self.bytes = self.phase = 0
        self.told = torch.zeros(AGENTS, dtype=torch.int32)
        self.clock = self.told
        """What a phase that has ended tells who waits for it."""

    def initialise(self, count: int) -> None:
        self.count = self.missing = count

    def arrive(self, agent: Agent, count: int = 1, *, expected: int = 0) -> None:
        assert self.count > 0, "a barrier that no one initialised"
        self.missing -= count
        self.bytes += expected
        if self.missing < 0:
            raise RaceError("more arrive at a barrier than it is made for")
        self._step(agent.clock)

    def receive(self, number: int, clock: Tensor) -> None:
        self.bytes -= number
        self._step(clock)

    def _step(self, clock: Tensor) -> None:
        self.told = torch.maximum(self.told, clock)
        if self.missing == 0 and self.bytes == 0:
            self.missing, self.phase, self.clock = self.count, self.phase + 1, self.told

    def has_ended(self, parity: int) -> bool:
        return self.phase & 1 != parity


class Shared:
    """A view of shared memory. Fresh memory is NaN."""

    def __init__(self, agents: Sequence[Agent], values: Tensor, trace: Tensor) -> None:
        self.agents, self.values, self.trace = agents, values, trace

    @classmethod
    def allocate(cls, agents: Sequence[Agent], dtype: torch.dtype, shape: Sequence[int]) -> Self:
        values = torch.empty(shape, dtype=dtype)
        poison(values)
        return cls(agents, values, torch.zeros((READ + READERS, *shape), dtype=torch.int32))

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def _seen(self, view: Callable[[Tensor, int], Tensor]) -> Self:
        """The same through a view, given the tensor and how many dimensions come before its own."""
        return type(self)(self.agents, view(self.values, 0), view(self.trace, 1))

    def index(self, index: Any) -> Self:
        place = int(index)
        assert 0 <= place < self.shape[0], f"stage {place} of {self.shape[0]}"
        return self._seen(lambda tensor, before: tensor.select(before, place))

    def slice(self, start: int, length: int, dim: int = 0) -> Self:
        return self._seen(lambda tensor, before: tensor.narrow(before + dim, start, length))

    def permute(self, order: Sequence[int]) -> Self:
        def permuted(tensor: Tensor, before: int) -> Tensor:
            return tensor.permute(*range(before), *(before + dim for dim in order))

        return self._seen(permuted)

    def _reinterpret(self, dtype: torch.dtype, shape: Sequence[int], layout: object) -> Self:
        assert dtype == self.dtype, f"{self.dtype} seen as {dtype}"
        return self._seen(lambda tensor, before: tensor.view(*tensor.shape[:before], *shape))

    def read(self, agent: Agent) -> Tensor:
        """The numbers, as the agent may read them.

        Raises:
            RaceError: It need not see what was written last.
        """
        self._check_writer(agent, "reads")
        self.trace[READ + agent.number].fill_(agent.tick())
        return self.values.clone()

    def write(self, agent: Agent, values: Tensor) -> None:
        """
        Raises:
            RaceError: Someone may still read, or write, what was there.
        """
        self._check_writer(agent, "writes")
        read = self.trace[READ:].amax(tuple(range(1, self.trace.dim())))
        unknown = (read > agent.clock[:READERS]).tolist()
        if any(unknown):
            reader = self.agents[unknown.index(True)]
            raise RaceError(f"{agent.name} writes what {reader.name} may still read")
        self.trace[WRITTEN].fill_(agent.tick() * AGENTS + agent.number)
        self.values.copy_(values)

    def _check_writer(self, agent: Agent, does: str) -> None:
        first, last = self.trace[WRITTEN].aminmax()
        writes = [first] if first == last else self.trace[WRITTEN].unique()
        for write in writes:
            written, number = divmod(int(write), AGENTS)
            writer = self.agents[number]
            if written > agent.clock[number]:
                raise RaceError(f"{agent.name} {does} what may not be written yet")
            if agent.engine and not writer.engine and written > writer.fenced:
                raise RaceError(f"{agent.name} {does} what no fence has shown to engines")


def poison(values: Tensor) -> None:
    values.fill_(float("nan") if values.dtype.is_floating_point else -(2**30))
