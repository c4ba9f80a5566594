"""Runs the Python blocks of Markdown pages, and the examples in the package's docstrings.

A page's blocks share one namespace, top to bottom. A block with ``>>>`` prompts is checked against
the output it shows; any other must run without an error. Needs the standard library alone, so that
a wheel can be tried in an environment with nothing else:

    python examples.py README.md docs/*.md     the pages
    python examples.py --docstrings zeta       the docstrings of a package's modules
"""

import contextlib
import doctest
import importlib
import io
import pkgutil
import re
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
_BLOCK = re.compile(r"^```python\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
_PROMPT = re.compile(r"^ *>>> ", flags=re.MULTILINE)


def blocks(text: str) -> list[tuple[int, str]]:
    """(number of the first line, code) of each ``python`` block of a page."""
    return [(text.count("\n", 0, found.start(1)) + 1, found[1]) for found in _BLOCK.finditer(text)]


def run_page(path: Path) -> int:
    """Runs a page's blocks in order.

    Returns:
        The number of blocks.

    Raises:
        AssertionError: An example printed something else than the page shows.
        Exception: Whatever a block raises.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    found = blocks(path.read_text(encoding="utf-8"))
    for line, code in found:
        # Empty lines in front, so that a traceback has the page's line numbers.
        if _PROMPT.search(code):
            parsed = doctest.DocTestParser().get_examples(code)
            test = doctest.DocTest(parsed, namespace, path.name, str(path), line - 1, code)
            run_examples(test)
            namespace.update(test.globs)
        else:
            source = compile("\n" * (line - 1) + code, str(path), "exec")
            with contextlib.redirect_stdout(io.StringIO()):
                exec(source, namespace)
    return len(found)


def run_examples(test: doctest.DocTest) -> int:
    """Runs one set of ``>>>`` examples, keeping its namespace.

    Returns:
        The number of examples.

    Raises:
        AssertionError: With doctest's report, if one differs.
    """
    report = io.StringIO()
    result = doctest.DocTestRunner(optionflags=OPTIONS).run(
        test, out=report.write, clear_globs=False
    )
    if result.failed:
        raise AssertionError(report.getvalue())
    return result.attempted


def run_docstrings(module: ModuleType) -> int:
    """Runs the examples in a module's docstrings; returns their number."""
    return sum(run_examples(test) for test in doctest.DocTestFinder().find(module))


def modules_with_examples(package: str) -> list[str]:
    """Names of a package's modules whose text holds a ``>>>`` prompt; none of them is imported."""
    root = importlib.import_module(package)
    names = [
        package,
        *(found.name for found in pkgutil.walk_packages(root.__path__, f"{package}.")),
    ]
    folder = Path(root.__path__[0]).parent
    found = []
    for name in names:
        stem = folder.joinpath(*name.split("."))
        path = stem / "__init__.py" if stem.is_dir() else stem.with_suffix(".py")
        # A library that was built in place has no text.
        if path.exists() and _PROMPT.search(path.read_text(encoding="utf-8")):
            found.append(name)
    return found


def main(arguments: list[str]) -> int:
    warnings.simplefilter("error")
    # torch's own word about an environment without numpy.
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    if arguments[:1] == ["--docstrings"]:
        for package in arguments[1:]:
            for name in modules_with_examples(package):
                count = run_docstrings(importlib.import_module(name))
                print(f"{name}: {count} examples run")
        return 0
    for page in arguments:
        print(f"{page}: {run_page(Path(page))} blocks run")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
