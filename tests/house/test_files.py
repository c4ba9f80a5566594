"""How the tree is kept: sizes of files, names, the changelog."""

import ast
import re
from pathlib import Path

import pytest

import zeta

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "zeta"
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 50
FILES = sorted(SOURCE.rglob("*.py"))


def identify(path: Path) -> str:
    return str(path.relative_to(SOURCE))


@pytest.mark.parametrize("path", FILES, ids=identify)
def test_file_is_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES


@pytest.mark.parametrize("path", FILES, ids=identify)
def test_file_name_says_what_is_inside(path: Path) -> None:
    assert path.stem not in {"utils", "util", "common", "helpers", "misc"}


@pytest.mark.parametrize("path", FILES, ids=identify)
def test_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def function_lengths(text: str) -> dict[str, int]:
    """Lines of each function's body, docstring apart; of several of one name, the longest's."""
    lengths: dict[str, int] = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            length = node.end_lineno - body[0].lineno + 1 if body else 0
            lengths[node.name] = max(length, lengths.get(node.name, 0))
    return lengths


def is_kernel(path: Path) -> bool:
    return "kernels" in path.parts


@pytest.mark.parametrize("path", [p for p in FILES if not is_kernel(p)], ids=identify)
def test_functions_are_short(path: Path) -> None:
    lengths = function_lengths(path.read_text(encoding="utf-8"))
    assert {name: n for name, n in lengths.items() if n > MAX_FUNCTION_LINES} == {}


def test_a_long_function_is_measured() -> None:
    text = 'def f():\n    """Two\n    lines."""\n' + "    x = 1\n" * 60
    assert function_lengths(text) == {"f": 60}


def test_a_long_method_is_measured_beside_a_short_one_of_its_name() -> None:
    long = "class A:\n    def f(self):\n" + "        x = 1\n" * 60
    assert function_lengths(long + "class B:\n    def f(self): pass\n") == {"f": 60}


PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_changelog_has_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[(.+?)\]", text, flags=re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert zeta.__version__ in headings or headings == ["Unreleased"]


def test_only_torch_is_needed() -> None:
    assert 'dependencies = ["torch>=2.11"]\n' in PROJECT


def test_version_is_the_packages() -> None:
    assert f'version = "{zeta.__version__}"\n' in PROJECT


def silenced_without_reason(text: str) -> list[str]:
    """Lines that silence a checker and do not say why."""
    silenced = re.compile(r"#\s*(noqa|type:\s*ignore)")
    reasons = (
        r"# noqa: [A-Z0-9, ]+ - \S",
        r"# type: ignore\[[a-z-, ]+\]  # \S",
        # A call of torch's that has no annotations needs no further word.
        r"# type: ignore\[(no-any-return, )?no-untyped-call\]$",
    )
    reasoned = re.compile("|".join(reasons))
    return [
        line for line in text.splitlines() if silenced.search(line) and not reasoned.search(line)
    ]


@pytest.mark.parametrize("path", FILES, ids=identify)
def test_a_silenced_checker_has_a_reason(path: Path) -> None:
    assert silenced_without_reason(path.read_text(encoding="utf-8")) == []


def test_a_silenced_checker_without_a_reason_is_found() -> None:
    bad = ["x = 1  # noqa", "x = 1  # noqa: E741", "f()  # type: ignore[arg-type]"]
    good = ["x = 1  # noqa: E741 - the paper's l", "f()  # type: ignore[arg-type]  # torch's stub"]
    assert silenced_without_reason("\n".join([*bad, *good])) == bad


@pytest.mark.parametrize("name", ["constraints.txt", "requirements-dev.txt"])
def test_requirements_name_packages_only(name: str) -> None:
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        assert re.fullmatch(r"(#.*)?|[a-z0-9-]+(==[0-9.]+)?(; .+)?", line)
