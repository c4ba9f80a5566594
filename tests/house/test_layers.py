"""Imports go down only; and the checker sees each way of breaking that."""

from pathlib import Path

import pytest

from tests.house import layers


def test_imports_go_down_only() -> None:
    assert layers.violations() == []


def test_every_file_of_the_package_is_read() -> None:
    found = layers.modules(layers.SOURCE)
    assert {"zeta", "zeta.masks", "zeta.ops.attention", "zeta.nn.attention"} <= set(found)


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize(
    ("importer", "text", "complaint"),
    [
        ("zeta/masks.py", "from zeta.nn import Linear", "import of zeta.nn goes up"),
        ("zeta/masks.py", "from zeta import nn", "import of zeta.nn goes up"),
        ("zeta/masks.py", "import zeta.nn.attention", "import of zeta.nn.attention goes up"),
        ("zeta/masks.py", "def f():\n    import zeta.nn", "line 2: the import of zeta.nn goes up"),
        ("zeta/masks.py", "from .nn import Linear", "import of zeta.nn goes up"),
        ("zeta/masks.py", "from zeta import attention", "import of zeta goes up"),
        ("zeta/masks.py", "from zeta import biases", "zeta.biases crosses to a neighbour"),
        ("zeta/nn/attention.py", "from zeta import cli", "import of zeta.cli goes up"),
        ("zeta/nn/attention.py", "from .. import cli", "import of zeta.cli goes up"),
        ("zeta/ops/call.py", "from zeta.ops.attention import attention", "goes up"),
        ("zeta/ops/backends/sdpa.py", "from .chunked import run", "crosses to a neighbour"),
        ("zeta/ops/backends/sdpa.py", "from ..attention import run", "zeta.ops.attention goes up"),
        ("zeta/ops/helpers.py", "import zeta.masks\nimport zeta.ops.call", "in no layer"),
    ],
)
def test_a_planted_violation_is_found(
    tmp_path: Path, importer: str, text: str, complaint: str
) -> None:
    names = ["__init__", "masks", "biases", "cli", "nn/__init__", "nn/attention", "ops/__init__"]
    names += ["ops/attention", "ops/call", "ops/backends/__init__", "ops/backends/chunked"]
    source = plant(tmp_path, {f"zeta/{name}.py": "" for name in names} | {importer: text})
    found = layers.violations(source)
    assert len(found) == 1
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("importer", "text"),
    [
        ("zeta/nn/attention.py", "from zeta.ops.attention import attention\nimport torch"),
        ("zeta/nn/attention.py", "from zeta import masks, biases"),
        ("zeta/__init__.py", "from zeta import nn"),
        ("zeta/cli.py", "import zeta"),
        ("zeta/ops/attention.py", "from zeta.ops.backends.chunked import run"),
        ("zeta/ops/backends/chunked.py", "from zeta.ops.call import AttentionCall"),
    ],
)
def test_imports_downwards_are_accepted(tmp_path: Path, importer: str, text: str) -> None:
    names = ["__init__", "masks", "biases", "nn/__init__", "nn/attention", "ops/__init__"]
    names += ["ops/attention", "ops/call", "ops/backends/__init__", "ops/backends/chunked"]
    source = plant(tmp_path, {f"zeta/{name}.py": "" for name in names} | {importer: text})
    assert layers.violations(source) == []
