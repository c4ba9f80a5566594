"""The pages of docs/: their pictures, and what the site adds to them."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PICTURE = re.compile(r"!\[[^\]]+\]\(([^)]+)\)")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shown() -> set[Path]:
    found = set()
    for page in DOCS.rglob("*.md"):
        for name in PICTURE.findall(page.read_text(encoding="utf-8")):
            found.add((page.parent / name).resolve())
    return found


def test_every_picture_is_there_and_shown() -> None:
    assert shown() == {path.resolve() for path in DOCS.rglob("*.png")}


@pytest.mark.slow
def test_every_picture_of_the_concepts_is_drawn_by_code(tmp_path: Path) -> None:
    pictures = load("pictures")
    pictures.FOLDER = tmp_path
    pictures.main()
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == {f"{name}.png" for name in pictures.PICTURES}
    assert drawn <= {path.name for path in DOCS.rglob("*.png")}


def test_backend_table_says_what_explain_says() -> None:
    lines = load("site").backend_table().splitlines()
    names = [cell.strip() for cell in lines[0].split("|")[2:-1]]
    assert {"sdpa", "chunked", "reference"} <= set(names)
    for line in lines[2:]:
        case, *cells = (cell.strip() for cell in line.split("|")[1:-1])
        assert len(cells) == len(names), case
        assert cells.count("**runs**") == 1, case
        assert cells[names.index("reference")] in ("can", "**runs**"), case
