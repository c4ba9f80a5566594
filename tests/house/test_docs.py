"""The pages of docs/: their pictures, and what the site adds to them."""

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"
RESULTS = DOCS.parent / "benchmarks" / "results"
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


Measured = dict[str, Any]


def ratio(row: Measured) -> str:
    return f"{row['ratio of medians']:.2f}"


def time_and_ratio(row: Measured) -> str:
    return f"{row['ours ms']['median']:.0f} | {ratio(row)}"


@pytest.mark.parametrize(("name", "cell"), [("cpu.json", time_and_ratio), ("cpu-avx2.json", ratio)])
def test_tables_of_the_cpu_hold_medians(name: str, cell: Callable[[Measured], str]) -> None:
    rows: dict[str, dict[str, Measured]] = {}
    for row in json.loads((RESULTS / name).read_text(encoding="utf-8"))["rows"]:
        rows.setdefault(row["row"], {})[row["shape"]] = row
    shown = table_after(f"`{name}`")
    assert len(shown) >= 10
    for line in shown:
        of_shapes = rows[line.split(" | ")[0]]
        cells = " | ".join(cell(of_shapes[shape]) for shape in "ABC")
        assert line == f"{line.split(' | ')[0]} | {cells}"


def test_a_step_of_decoding_is_told_by_medians() -> None:
    rows = json.loads((RESULTS / "cpu.json").read_text(encoding="utf-8"))["rows"]
    expected = []
    for row in rows:
        if " decode " in row["row"]:
            name = f"{row['row'].replace(' decode', ',')}, {row['shape'][2:]} cached"
            speed, milliseconds = row["ours GB/s"], row["ours ms"]["median"]
            # Keys and values of 4 heads.
            width, cached = map(int, re.findall(r"D (\d+), (\d+)", name)[0])
            num_bytes = 2 * 4 * width * cached * (2 if "bf16" in name else 4)
            assert speed == pytest.approx(num_bytes / milliseconds / 1e6)
            cells = f"{milliseconds:.3f} | {row['ratio of medians']:.1f} | {speed:.0f}"
            expected.append(f"{name} | {cells}")
    assert table_after("A step of a generation") == expected


def table_after(words: str) -> list[str]:
    """The rows of the first table of the speed page that stands behind these words."""
    text = (DOCS / "speed.md").read_text(encoding="utf-8").partition(words)[2]
    found = re.search(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert found is not None
    return [line.strip("| ") for line in found[0].splitlines()[2:]]
