"""Which module may import which: imports go down only, and neighbours of one row never meet.

Read from the syntax tree, so that imports inside functions and under ``TYPE_CHECKING`` count too.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src"

# A package, and its parts from the top down; a part may import those of later rows. "" is the
# package's own __init__. A part that stands in no row is an error: say here where it belongs.
LAYERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "zeta": (
        ("__main__",),
        ("cli",),
        ("",),
        ("bench", "examples", "plots", "convert"),
        ("integrations",),
        ("generation",),
        ("nn",),
        ("ops", "caches"),
        ("masks", "biases"),
        ("values", "stored"),
        ("positions", "standin"),
        ("transforms",),
    ),
    "zeta.ops": (
        ("",),
        ("attention", "projection", "rotation"),
        ("stored", "plain"),
        ("weights", "backends", "sinks"),
        ("deferred", "reading", "plain_lowering"),
        ("parts", "dropout", "lowering"),
        ("offsets",),
        ("buffers", "functions", "registration", "substitution", "turning", "versions"),
        ("call",),
        ("precision",),
    ),
    "zeta.ops.backends": (
        ("",),
        ("reference", "sdpa", "chunked", "cpu", "triton"),
    ),
}


def imports(path: Path, module: str) -> Iterator[tuple[int, str]]:
    """Each (line, absolute dotted name) that a file imports; a name may end in a non-module."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def modules(source: Path) -> dict[str, Path]:
    """Dotted name to file, of all modules under a source folder."""
    found = {}
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def violation(importer: str, imported: str) -> str | None:
    """Why one module may not import the other; None if it may."""
    shared = max(
        (
            package
            for package in LAYERS
            if all(f"{name}.".startswith(f"{package}.") for name in (importer, imported))
        ),
        key=len,
    )
    upper, lower = (name[len(shared) + 1 :].partition(".")[0] for name in (importer, imported))
    if upper == lower:
        return None
    rows = {part: row for row, parts in enumerate(LAYERS[shared]) for part in parts}
    for part in (upper, lower):
        if part not in rows:
            return f"{shared}.{part} stands in no layer"
    if rows[upper] < rows[lower]:
        return None
    return "goes up" if rows[upper] > rows[lower] else "crosses to a neighbour"


def violations(source: Path = SOURCE) -> list[str]:
    """One line for each import that breaks the rule."""
    files = modules(source)
    lines = []
    for module, path in files.items():
        for line, name in imports(path, module):
            # `from zeta.masks import Causal` names a member: cut back to the module.
            while name and name not in files:
                name = name.rpartition(".")[0]
            reason = violation(module, name) if name and name != module else None
            if reason:
                lines.append(f"{module}, line {line}: the import of {name} {reason}")
    return lines
