"""Figures: what is drawn, and that a file is written whole or not at all."""

import re
import sys
from pathlib import Path

import pytest
import torch

from zeta import plots

matplotlib = pytest.importorskip("matplotlib")


def test_map_has_labels_and_values() -> None:
    weights = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.3, 0.5]], requires_grad=True)
    figure = plots.attention_map(weights, ["seven", "<end>"], ["a", "b", "c"], title="a title")
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["seven", "<end>"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b", "c"]
    assert [text.get_text() for text in axes.texts] == ["90", "10", "20", "30", "50"]
    assert figure.get_suptitle() == "a title"
    assert axes.images[0].get_array().tolist() == weights.tolist()


def test_labels_are_no_mathematics(tmp_path: Path) -> None:
    labels = ["$x$", r"$\no$", r"\$5"]
    figure = plots.attention_map(torch.ones(1, 3) / 3, ["$5$"], labels, title="")
    plots.save(figure, tmp_path / "map.png")
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == labels
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        assert not label.get_parse_math()


def test_labels_must_fit() -> None:
    message = "weights must be (target, source) = (1, 2) like the labels; got (2, 2)"
    with pytest.raises(ValueError, match=re.escape(message)):
        plots.attention_map(torch.ones(2, 2), ["a"], ["b", "c"], title="")


def test_growth_has_a_panel_for_each_quantity_and_one_colour_for_each_line() -> None:
    lines = {
        "seconds": {"ours": [(128, 0.5), (256, 1.0)], "theirs": [(128, 1.0)]},
        "MiB": {"theirs": [(128, 4.0)], "ours": [(128, 2.0), (256, 4.0)]},
    }
    figure = plots.growth(lines, axis="tokens", title="a title")
    colours = []
    for axes, (panel, of_panel) in zip(figure.axes, lines.items(), strict=True):
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("tokens", panel)
        drawn = {line.get_label(): line for line in axes.lines}
        assert {name: line.get_xydata().tolist() for name, line in drawn.items()} == {
            name: [list(point) for point in points] for name, points in of_panel.items()
        }
        colours.append({name: line.get_color() for name, line in drawn.items()})
    assert colours[0] == colours[1]
    assert colours[0]["ours"] != colours[0]["theirs"]
    assert figure.get_suptitle() == "a title"


def test_growth_refuses_what_has_no_logarithm() -> None:
    message = "MiB, ours: (128, 0.0) must be positive"
    with pytest.raises(ValueError, match=re.escape(message)):
        plots.growth({"MiB": {"ours": [(128, 0.0)]}}, axis="tokens", title="")


def test_missing_matplotlib_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'zeta-attention\[demo\]'"):
        plots.attention_map(torch.ones(1, 1), ["a"], ["b"], title="")


@pytest.mark.parametrize("kind", [str, Path])
def test_a_figure_is_saved_where_a_path_says(
    kind: type[str | Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    figure = plots.attention_map(torch.ones(1, 1), ["a"], ["b"], title="")
    plots.save(figure, kind("map.png"))
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_failed_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "map.png"
    figure = plots.attention_map(torch.ones(1, 1), ["a"], ["b"], title="")
    plots.save(figure, path)
    content = path.read_bytes()

    def fail(file, **_):  # type: ignore[no-untyped-def]
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(KeyboardInterrupt):
        plots.save(figure, path)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]
