"""The states that open forks go back to."""

from collections.abc import Iterable
from typing import Generic, TypeVar

State = TypeVar("State")


class Forks(Generic[State]):
    """A stack of states; a state is never written to once it is here."""

    def __init__(self, states: Iterable[State] = ()) -> None:
        self.states = list(states)

    def __len__(self) -> int:
        return len(self.states)

    def open(self, state: State) -> None:
        """Remember a state."""
        self.states.append(state)

    def close(self, verb: str) -> State:
        """The state of the last open fork, which is then closed.

        Args:
            verb: What the caller does, for the message.

        Raises:
            ValueError: No fork is open.
        """
        if not self.states:
            raise ValueError(f"{verb}() needs an open fork; call fork() first")
        return self.states.pop()

    def clear(self) -> None:
        """Close all forks."""
        self.states.clear()
