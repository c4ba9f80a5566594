"""Who runs when: one task at a time, and a random one of those that can go on.

Asynchronous work (copies, products) is done at random too, between its beginning and the moment
when someone waits for it. What no one is made to wait for is thus found by some seed.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable


class StuckError(Exception):
    """No task can go on."""


class _Ended(BaseException):
    """Unwinds a task whose schedule has failed."""


class Task:
    """A thread that runs only when its schedule lets it."""

    def __init__(self, schedule: Schedule, name: str, work: Callable[[], None]) -> None:
        self.schedule, self.name, self.work = schedule, name, work
        self.ready: Callable[[], bool] = lambda: True
        self.waits_for = "its beginning"
        self.finished = False
        self.turn = threading.Semaphore(0)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        self.turn.acquire()
        try:
            if not self.schedule.failed:
                self.work()
        except _Ended:
            pass
        except BaseException as error:
            self.schedule.failure = self.schedule.failure or error
        self.finished = True
        self.schedule.turn.release()

    def pause(self, what: str, ready: Callable[[], bool] = lambda: True) -> None:
        """Lets others run; goes on at some time when it is ready."""
        self.waits_for, self.ready = what, ready
        self.schedule.turn.release()
        self.turn.acquire()
        if self.schedule.failed:
            raise _Ended


class Schedule:
    """Tasks and pending work, run in an order that the seed alone decides."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.laziness = self.random.choice((0.0, 0.5, 0.95))
        """How seldom asynchronous work is done before someone waits for it."""
        self.tasks: list[Task] = []
        self.pending: list[Callable[[], None]] = []
        self.turn = threading.Semaphore(0)
        self.failure: BaseException | None = None

    @property
    def failed(self) -> bool:
        return self.failure is not None

    def begin(self, name: str, work: Callable[[], None]) -> Task:
        task = Task(self, name, work)
        self.tasks.append(task)
        return task

    def run(self) -> None:
        """Until every task has finished.

        Raises:
            StuckError: They wait for each other.
        """
        while self.tasks and not self.failed:
            ready = [task for task in self.tasks if task.ready()]
            if self.pending and (not ready or self.random.random() >= self.laziness):
                self._work(self.pending.pop(self.random.randrange(len(self.pending))))
            elif ready:
                self._let_run(self.random.choice(ready))
            else:
                waits = ", ".join(f"{task.name} for {task.waits_for}" for task in self.tasks)
                self.failure = StuckError(f"every task waits: {waits}")
        while self.pending and not self.failed:
            self._work(self.pending.pop())
        for task in list(self.tasks):
            self._let_run(task)
        if self.failure is not None:
            raise self.failure

    def _work(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self.failure = error

    def _let_run(self, task: Task) -> None:
        task.turn.release()
        self.turn.acquire()
        if task.finished:
            task.thread.join()
            self.tasks.remove(task)
