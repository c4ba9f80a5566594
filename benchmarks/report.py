"""The head of a results file, and the file itself."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from zeta.bench.machine import describe_machine, installed_version

ROOT = Path(__file__).parents[1]


def describe_run(*packages: str) -> dict[str, str | int]:
    """The machine, the command, the commit, and the versions of ``packages``."""
    module = f"benchmarks.{Path(sys.argv[0]).stem}"
    found = describe_machine() | {
        "command": " ".join(["python", "-m", module, *sys.argv[1:]]),
        "commit": _commit(),
    }
    return found | {package: installed_version(package) for package in packages}


def headline(run: Mapping[str, object]) -> str:
    """What `describe_run` says, and what a script adds to it, in one line."""
    return ", ".join(f"{name} {value}" for name, value in run.items())


def write(results: object, path: Path | None) -> None:
    """As JSON; to be called whenever there is more, so that what ends early leaves what it has."""
    if path is not None:
        path.write_text(json.dumps(results, indent=2) + "\n")


def _commit() -> str:
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return answer.stdout.strip()
