"""What commands write to the terminal: headings, aligned rows, a progress bar."""

import sys
from collections.abc import Iterable, Iterator
from importlib.util import find_spec

INSTALL = "pip install 'zeta-attention[demo]'"


class InputError(Exception):
    """What the user gave cannot be used; the message is one line."""


def heading(text: str) -> None:
    """Write the title of a part, after an empty line."""
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def row(label: str, value: str = "") -> None:
    """Write a label, and a value that stands in the same column in every row."""
    print(f"  {label:<12} {value}".rstrip(), flush=True)


def number_row(value: str, text: str) -> None:
    """Write a number, aligned at its right end, and what it is."""
    print(f"  {value:>12}  {text}", flush=True)


def is_installed(package: str) -> bool:
    """Whether a package can be imported."""
    return find_spec(package) is not None


def progress(losses: Iterable[float], total: int, label: str) -> Iterator[float]:
    """Pass on the losses of a training while a bar on standard error fills.

    There is no bar where standard error is not a terminal, and only a count without tqdm.

    Args:
        losses: One for each step.
        total: How many there will be.
        label: Stands before the bar.

    Yields:
        Each loss.
    """
    if not sys.stderr.isatty():
        yield from losses
    elif is_installed("tqdm"):
        yield from _bar(losses, total, label)
    else:
        try:
            for step, loss in enumerate(losses, start=1):
                print(f"\r  {label:<12} {step}/{total}", end="", file=sys.stderr, flush=True)
                yield loss
        finally:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _bar(losses: Iterable[float], total: int, label: str) -> Iterator[float]:
    from tqdm import tqdm

    layout = "  {desc:<12} {bar:30} {percentage:3.0f} %  {n}/{total}  {remaining} left{postfix}"
    with tqdm(total=total, desc=label, bar_format=layout, leave=False) as bar:
        for loss in losses:
            bar.set_postfix_str(f"loss {loss:.2f}", refresh=False)
            bar.update()
            yield loss
