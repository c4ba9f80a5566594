"""The command ``zeta``: one module for each of its commands."""

import argparse
import io
import os
import sys
from collections.abc import Sequence

import zeta
from zeta.cli import convert, demo, doctor
from zeta.cli.terminal import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command of ``zeta``.

    Args:
        arguments: What is said on the command line; that of the process by default.

    Returns:
        The exit code: 0; 1 where a check failed; 2 for wrong input; 130 when interrupted.
    """
    parser = argparse.ArgumentParser(prog="zeta", description=zeta.__doc__)
    parser.add_argument("--version", action="version", version=f"zeta {zeta.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for module in (demo, doctor, convert):
        module.add_to(commands)
    parsed = parser.parse_args(arguments)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            # It was closed before the process began: what is written has nowhere to go.
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for as long as the process
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A model writes what it likes, also what the terminal has no character for.
        sys.stdout.reconfigure(errors="replace")
    try:
        code: int = parsed.run(parsed)
        sys.stdout.flush()
    except InputError as error:
        print(f"zeta {parsed.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"zeta {parsed.command}: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        # What is still in the buffer has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"zeta {parsed.command}: {error}", file=sys.stderr)
        # Else the reader went away, as `head` does.
        return 1
    return code
