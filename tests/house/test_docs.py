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


@pytest.mark.parametrize(
    ("name", "cell"),
    [
        ("cpu.json", time_and_ratio),
        ("cpu-avx512.json", time_and_ratio),
        ("cpu-avx512-bf16.json", time_and_ratio),
        ("cpu-avx2.json", ratio),
    ],
)
def test_tables_of_the_cpu_hold_medians(name: str, cell: Callable[[Measured], str]) -> None:
    rows: dict[str, dict[str, Measured]] = {}
    for row in measured(name):
        rows.setdefault(row["row"], {})[row["shape"]] = row
    _, shown = table_after(f"`{name}`")
    assert len(shown) >= 8
    for line in shown:
        of_shapes = rows[line.split(" | ")[0]]
        cells = " | ".join(cell(of_shapes[shape]) for shape in "ABC")
        assert line == f"{line.split(' | ')[0]} | {cells}"


def test_a_step_of_decoding_is_told_by_medians() -> None:
    expected = []
    for row in measured("cpu.json"):
        if " decode " in row["row"]:
            name = f"{row['row'].replace(' decode', ',')}, {row['shape'][2:]} cached"
            speed, milliseconds = row["ours GB/s"], row["ours ms"]["median"]
            # Keys and values of 4 heads.
            width, cached = map(int, re.findall(r"D (\d+), (\d+)", name)[0])
            num_bytes = 2 * 4 * width * cached * (2 if "bf16" in name else 4)
            assert speed == pytest.approx(num_bytes / milliseconds / 1e6)
            cells = f"{milliseconds:.3f} | {row['ratio of medians']:.1f} | {speed:.0f}"
            expected.append(f"{name} | {cells}")
    assert table_after("A step of a generation")[1] == expected


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("cpu-avx2-lengths.json", "T "),
        ("cpu-avx2-windows.json", ""),
        ("cpu-compiled.json", "H 8 T "),
    ],
)
def test_tables_over_a_size_hold_medians(name: str, prefix: str) -> None:
    rows = {(row["row"], row["shape"]): row for row in measured(name)}
    sizes, lines = table_after(f"`{name}`")
    shown = 0
    for line in lines:
        name, *cells = line.split(" | ")
        for size, cell in zip(sizes, cells, strict=True):
            if cell:
                assert cell == ratio(rows[name, prefix + size]), (name, size)
                shown += 1
    assert shown == sum(prefix in shape for _, shape in rows)


def test_tables_of_modules_and_rotations_hold_medians() -> None:
    rows = {(row["row"], row["shape"]): row for row in measured("cpu-avx512-modules.json")}
    for line in table_after("`cpu-avx512-modules.json`")[1]:
        name, milliseconds, factor = line.split(" | ")
        row = rows[f"{name[:4]} module training", name[5:]]
        assert milliseconds == f"{row['ours ms']['median']:.0f}", name
        assert factor == f"{row['ratio of medians']:.1f}", name
    columns, lines = table_after("`--rows rotary`")
    assert columns == ["A", "B", "C", "1 token"]
    assert len(lines) == 4
    for line in lines:
        name, *cells = (cell.strip() for cell in line.split("|"))
        for column, cell in zip(columns, cells, strict=True):
            assert cell == (ratio(rows[name, column]) if (name, column) in rows else ""), name


def test_ranges_of_short_calls_hold_medians() -> None:
    columns, lines = table_after("lowest and highest")
    assert len(columns) == 4
    for line in lines:
        name, *cells = line.split(" | ")
        for column, cell in zip(columns, cells, strict=True):
            dtype, file = column.split(", ")
            rows = [row for row in measured(file.strip("`")) if row["row"] == f"{dtype} {name}"]
            found = [row["ratio of medians"] for row in rows]
            assert cell == f"{min(found):.2f} to {max(found):.2f}", (name, dtype, file)


def measured(name: str) -> list[Measured]:
    rows: list[Measured] = json.loads((RESULTS / name).read_text(encoding="utf-8"))["rows"]
    return rows


def table_after(words: str) -> tuple[list[str], list[str]]:
    """The columns but the first, and the rows, of the first table of the speed page that stands
    behind these words."""
    text = (DOCS / "speed.md").read_text(encoding="utf-8").partition(words)[2]
    found = re.search(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert found is not None
    head, _, *lines = (line.strip().strip("|").strip() for line in found[0].splitlines())
    return [column.strip() for column in head.split("|")[1:]], lines
