"""Every example in README, docs and docstrings runs; and the runner notices wrong ones."""

import importlib
from pathlib import Path

import pytest

from tests.house import examples

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "DESIGN.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_runs(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    assert examples.run_page(page) == sum(line.lstrip().startswith("```py") for line in lines)


@pytest.mark.parametrize("name", examples.modules_with_examples("zeta"))
def test_docstring_runs(name: str) -> None:
    assert examples.run_docstrings(importlib.import_module(name)) > 0


def test_readme_has_an_example() -> None:
    assert examples.blocks((ROOT / "README.md").read_text(encoding="utf-8"))


PAGE = """
Text.

```python
x = 2
```

```sh
not python
```

```python
>>> y = x + 1
>>> y
3
```

```python
assert y == 3
```
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "page.md"
    path.write_text(text, encoding="utf-8")
    return path


def test_blocks_share_a_namespace(tmp_path: Path) -> None:
    assert examples.run_page(write(tmp_path, PAGE)) == 3


def test_a_wrong_output_fails(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"(?s)page\.md.*line 14.*Expected:\s+4\s+Got:\s+3"):
        examples.run_page(write(tmp_path, PAGE.replace("\n3\n", "\n4\n")))


def test_a_failing_block_fails_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        examples.run_page(write(tmp_path, PAGE.replace("x = 2", "x = 1 / 0")))
    assert caught.traceback[-1].lineno + 1 == 5


def test_a_wrong_docstring_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wrong_example.py").write_text('"""\n>>> 1 + 1\n3\n"""\n', encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(AssertionError, match=r"Expected:\s+3\s+Got:\s+2"):
        examples.run_docstrings(importlib.import_module("wrong_example"))
