"""Figures made from data; they need matplotlib: ``pip install 'zeta-attention[demo]'``."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def attention_map(
    weights: Tensor,
    target_labels: Sequence[str],
    source_labels: Sequence[str],
    *,
    title: str,
    target_title: str = "target",
    source_title: str = "source",
) -> "Figure":
    """Draw attention weights: a row for each query, a column for each key, weights as shades.

    Args:
        weights: ``(T, S)``, in [0, 1].
        target_labels: T names, written beside the rows.
        source_labels: S names, written above the columns.
        title: Of the figure.
        target_title: What the rows are.
        source_title: What the columns are.

    Returns:
        A figure; see `save`.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The labels do not fit the weights.
    """
    if weights.shape != (len(target_labels), len(source_labels)):
        raise ValueError(
            f"weights must be (target, source) = ({len(target_labels)}, {len(source_labels)}) "
            f"like the labels; got {tuple(weights.shape)}"
        )
    rows, columns = weights.shape
    figure = _figure(2.6 + 0.5 * columns, 1.7 + 0.42 * rows)
    axes = figure.add_subplot()
    values = weights.detach().float().cpu().numpy()
    image = axes.imshow(values, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    for row in range(rows):
        for column in range(columns):
            value = float(values[row, column])
            if value >= 0.05:
                colour = "white" if value > 0.55 else "black"
                text = f"{100 * value:.0f}"
                axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    # Tokens are no mathematics, dollars among them.
    axes.set_xticks(range(columns), labels=source_labels, fontsize=12, parse_math=False)
    axes.set_yticks(range(rows), labels=target_labels, fontsize=11, parse_math=False)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xlabel(source_title)
    axes.set_ylabel(target_title)
    axes.tick_params(length=0)
    axes.set_xticks([column - 0.5 for column in range(1, columns)], minor=True)
    axes.set_yticks([row - 0.5 for row in range(1, rows)], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(image, ax=axes, shrink=0.9, pad=0.03)
    bar.set_label("attention weight, %")
    bar.set_ticks([0.0, 0.5, 1.0], labels=["0", "50", "100"])
    bar.outline.set_visible(False)
    figure.suptitle(title, fontsize=12)
    return figure


def growth(
    lines: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    *,
    axis: str,
    title: str,
) -> "Figure":
    """Draw how quantities grow with a size, each in a panel, both axes in powers of two.

    Args:
        lines: For each panel, named by what it measures, the points ``(size, value)`` of each line,
            by the line's name. A line has one colour in all panels.
        axis: What the size is.
        title: Of the figure.

    Returns:
        A figure; see `save`.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: A size or a value is not positive, so that it has no logarithm.
    """
    for panel, of_panel in lines.items():
        for name, points in of_panel.items():
            for point in points:
                if min(point) <= 0:
                    raise ValueError(f"{panel}, {name}: {point} must be positive")
    figure = _figure(5.2 * max(1, len(lines)), 4.4)
    names = sorted({name for of_panel in lines.values() for name in of_panel})
    for column, (panel, of_panel) in enumerate(lines.items()):
        axes = figure.add_subplot(1, len(lines), column + 1)
        for name, points in of_panel.items():
            sizes, values = zip(*points, strict=True) if points else ((), ())
            axes.plot(sizes, values, marker="o", label=name, color=f"C{names.index(name)}")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xlabel(axis)
        axes.set_ylabel(panel)
        axes.grid(color="0.9")
        axes.legend(fontsize=9)
    figure.suptitle(title, fontsize=12)
    return figure


def _figure(width: float, height: float) -> "Figure":
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'zeta-attention[demo]'") from error

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: "Figure", path: str | Path) -> None:
    """Write a figure as PNG, whole or not at all.

    Args:
        figure: What is drawn.
        path: The file, in a folder that exists; replaced if it is there.

    Raises:
        OSError: It cannot be written.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            figure.savefig(file, format="png", dpi=160)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
