"""Programs of a grid, and the workers inside of them."""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.ops.triton.gluon_model.memory import AGENTS, COPIES, READERS, Agent
from tests.ops.triton.gluon_model.schedule import Schedule, Task
from tests.ops.triton.gluon_model.values import Block

RESIDENT = 4
"""Programs at most that run at once."""


class Product:
    """The result of an asynchronous product: no number until someone has waited for it."""

    def __init__(self, work: Callable[[], Tensor]) -> None:
        self.work, self.numbers = work, torch.empty(0)
        self.clock = torch.empty(0)
        self.done = False


class Transfer:
    """A copy from shared memory that was begun: first what it takes is read, then it arrives."""

    def __init__(self) -> None:
        self.is_read = self.has_arrived = False
        self.clock = torch.empty(0)


class Worker:
    """Some warps of a program that run one function, and the engine that works for them."""

    def __init__(self, program: Program, agent: Agent, engine: Agent) -> None:
        self.program, self.agent, self.engine = program, agent, engine
        self.products: deque[Product] = deque()
        self.transfers: list[Transfer] = []
        self.looked: dict[int, int] = {}
        """Of places in global memory, at which state of it they were read last."""
        self.task: Task

    @property
    def device(self) -> Device:
        return self.program.device

    def pause(self, what: str, ready: Callable[[], bool] = lambda: True) -> None:
        self.task.pause(what, ready)

    def multiply(self) -> None:
        """Does the product that was begun first, if any is left."""
        if self.products:
            product = self.products.popleft()
            self.engine.stand_at(product.clock)
            product.numbers = product.work()
            product.clock, product.done = self.engine.clock.clone(), True


class Program:
    """One program of the grid: agents of its own, whose clocks say who knows of whom."""

    def __init__(self, device: Device, number: int) -> None:
        self.device, self.number = device, number
        self.agents = [Agent(place, "a copy", engine=True) for place in range(AGENTS)]
        self.num_readers = self.num_copies = 0

    def worker(self, name: str, work: Callable[[], None]) -> Worker:
        """Begins one."""
        numbers = self.num_readers, self.num_readers + 1
        self.num_readers += 2
        assert self.num_readers <= READERS
        worker = Worker(
            self, Agent(numbers[0], name), Agent(numbers[1], f"the engine of {name}", engine=True)
        )
        for agent in (worker.agent, worker.engine):
            self.agents[agent.number] = agent

        def run() -> None:
            _here.worker = worker
            work()

        worker.task = self.device.schedule.begin(name, run)
        return worker

    def copy(self) -> Agent:
        """Who does the next copy."""
        self.num_copies += 1
        return self.agents[READERS + self.num_copies % COPIES]

    def specialise(self, parts: list[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
        """Runs each function with its arguments in a worker of its own, and waits for all."""
        tasks = [
            self.worker(
                f"worker {place} of program {self.number}", functools.partial(function, *arguments)
            ).task
            for place, (function, arguments) in enumerate(parts)
        ]
        here().pause("its workers", lambda: all(task.finished for task in tasks))


class Device:
    """Runs a grid in an order that a seed decides."""

    def __init__(self, seed: int) -> None:
        self.schedule = Schedule(seed)
        self.state = 0
        """Counts what was written to global memory."""

    def run(self, kernel: Callable[[], None], num_programs: int) -> None:
        """
        Raises:
            RaceError: Two accesses are in no order.
            StuckError: Workers wait for each other.
        """
        resident = self.schedule.random.randint(1, RESIDENT)
        running = 0

        def program() -> None:
            nonlocal running
            running += 1
            kernel()
            running -= 1

        for number in range(num_programs):
            worker = Program(self, number).worker(f"program {number}", program)
            worker.task.ready = lambda: running < resident
        self.schedule.run()


_here = threading.local()


def here() -> Worker:
    """Who runs."""
    worker: Worker = _here.worker
    return worker


def program_id(axis: int) -> Block:
    assert axis == 0
    return Block(torch.tensor(here().program.number, dtype=torch.int32))
