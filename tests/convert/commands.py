"""`zeta convert` as tests call it."""

import os
from typing import Any

import pytest

from zeta.cli import main

Captured = pytest.CaptureFixture[str]


def run(*arguments: object) -> int:
    return main(["convert", *map(str, arguments)])


def refuse(capsys: Captured, words: str, *arguments: object) -> None:
    """Checks for exit code 2 and one line of error with these words."""
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("zeta convert: ")
    assert error.count("\n") == 1
    assert words in error


class Evil:
    def __reduce__(self) -> Any:
        return (os.system, ("touch pwned",))
