"""A bar on the standard error, for whoever asks for one: a library is silent."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

Step = TypeVar("Step")


def with_bar(steps: Iterable[Step], count: int, what: str = "token") -> Iterator[Step]:
    """The same steps, and a bar of at most ``count`` of them.

    Raises:
        ImportError: tqdm is not installed.
    """
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("progress=True needs tqdm: pip install 'zeta-attention[demo]'") from error
    shown: Iterator[Step] = iter(tqdm(steps, total=count, unit=what, leave=False))
    return shown
