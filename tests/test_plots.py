"""Pictures: what they must show, whatever the environment, the names and the number of rows."""

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from bitnet import plots
from bitnet.evaluation import pictures
from bitnet.plots import Point
from tests.forked import Forked

pytestmark = pytest.mark.usefixtures("reference_backend")
ROWS = [{"step": s, "loss": 5 * math.exp(-s / 300) + 2} for s in range(0, 1000, 50)]
ROWS += [{"step": s, "val_loss": 5 * math.exp(-s / 300) + 2.05} for s in range(100, 1001, 100)]
TITLE = "Relative error of the residual stream behind each layer"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are drawn, laid out."""
    figures: list[Any] = []
    original = plots._figure

    @contextmanager
    def kept(*arguments: Any, **options: Any) -> Iterator[Any]:
        with original(*arguments, **options) as axes:
            yield axes
            figure = (axes.flat[0] if hasattr(axes, "flat") else axes).figure
            figure.draw_without_rendering()
            figures.append(figure)

    monkeypatch.setattr(plots, "_figure", kept)
    return figures


def inside(figure: Any) -> bool:
    """Whether every text of the axes lies inside the picture."""
    renderer, width, height = figure.canvas.get_renderer(), *figure.canvas.get_width_height()
    boxes = [text.get_window_extent(renderer) for axes in figure.axes for text in axes.texts if text.get_text()]
    return all(b.x0 >= 0 and b.x1 <= width and b.y0 >= 0 and b.y1 <= height for b in boxes)


def test_the_loss_marks_the_switch_and_its_label_stays_inside(tmp_path: Path, drawn: list[Any]) -> None:
    for switch in ((500, 500), (300, 700), None):
        plots.draw_loss({"run": ROWS}, tmp_path / "loss.png", switch=switch)
    at_once, ramp, never = ([text.get_text() for text in f.axes[0].get_legend().get_texts()] for f in drawn)
    assert "float before, quantized from here" in at_once
    assert "quantizers fade in" in ramp
    assert never == ["run, validation"]
    for figure in drawn:
        (label,) = figure.axes[0].texts
        box, frame = label.get_window_extent(), figure.axes[0].get_window_extent()
        assert frame.x0 < box.x0 < box.x1 < frame.x1
        assert frame.y0 < box.y0 < box.y1 < frame.y1


def test_every_method_has_its_error_bar_the_worst_one_too(tmp_path: Path, drawn: list[Any]) -> None:
    points = [Point("a", "float", 1, 10), Point("b", "gguf", 2, 11, 0.5), Point("c", "gguf", 3, 15, 0.7)]
    plots.draw_scatter(points, tmp_path / "p.png", xlabel="MB", title="t")
    points.append(Point("far", "gguf", 4, 99, 5.0))
    plots.draw_scatter(points, tmp_path / "q.png", xlabel="MB", title="t")

    def bars(figure: Any) -> list[float]:
        segments = [s for c in figure.axes[0].collections for s in c.get_segments()]
        return sorted(round(float(s[1][1] - s[0][1]) / 2, 6) for s in segments)

    assert bars(drawn[0]) == [0.0, 0.5, 0.7]
    assert bars(drawn[1]) == [0.0, 0.0, 0.5, 0.7]  # the one at the edge has an arrow


@pytest.mark.parametrize("count", [1, 3, 40])
def test_the_bar_of_layers_has_room_for_its_numbers(tmp_path: Path, drawn: list[Any], count: int) -> None:
    plots.draw_layers({f"m{i}": [0.01 * (i + 1), 0.1 * (i + 1)] for i in range(count)}, tmp_path / "l.png", title=TITLE)
    figure = drawn[0]
    bar = figure.axes[1]
    boxes = sorted(
        (text.get_window_extent() for text in bar.get_yticklabels() if text.get_text()), key=lambda box: box.y0
    )
    assert len(boxes) >= 2
    assert all(below.y1 <= above.y0 for below, above in itertools.pairwise(boxes))
    main = figure.axes[0].get_window_extent()
    assert main.x1 < bar.get_window_extent().x0
    assert inside(figure)


def test_histograms_show_levels_and_the_share_of_zeros(tmp_path: Path, drawn: list[Any]) -> None:
    torch.manual_seed(0)
    for columns in (512, 576, 60):  # blocks of 256, of 32, and none
        pictures._draw_weights(torch.randn(40, columns) * 0.02, tmp_path / "weights.png")
    titles = [[axes.get_title() for axes in figure.axes if axes.get_title()] for figure in drawn]
    assert [len(each) for each in titles] == [6, 6, 4]
    assert [any("Q2_K: 4 levels" in title for title in each) for each in titles] == [True, False, False]
    assert any("Q4_0: 16 levels" in title for title in titles[1])
    ternary = titles[0][0]
    assert ternary.startswith("ternary: 3 levels a scale, 3")
    assert ternary.endswith("% zeros")
    assert titles[0][1] == "binary: 2 levels a scale, 0.0% zeros"
    lines = [c for axes in drawn[0].axes for c in axes.collections if len(c.get_segments()) == 3]
    assert len(lines) == 1  # the levels of the ternary weight


def test_pictures_of_constants(tmp_path: Path) -> None:
    plots.draw_histograms(torch.zeros(50), {"zero": torch.zeros(50)}, tmp_path / "h.png", title="t", log=True)
    plots.draw_layers({"exact": [0.0, 0.0]}, tmp_path / "l.png", title="t")
    rows = {"nothing": [], "no numbers": [{"step": 1, "loss": None, "val_loss": None}]}  # of infinite losses
    plots.draw_loss(rows, tmp_path / "n.png", switch=(5, 9))
    assert all((tmp_path / f"{name}.png").stat().st_size > 1000 for name in "hln")


def test_neither_environment_nor_names_stop_a_picture(tmp_path: Path) -> None:
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.family: No Such Font\nbackend: nonsense\n")
    code = (
        "import sys, pathlib; from bitnet.plots import draw_loss, draw_layers\n"
        "names = ['a$b', '$x_{', '\\\\frac{', '\u65e5\u672c', '100%', '_hidden']\n"
        "rows = [{'step': 1, 'loss': 2.0}, {'step': 2, 'val_loss': 1.5}]\n"
        "draw_loss({name: rows for name in names}, pathlib.Path('loss.png'))\n"
        "draw_layers({name: [0.1, 0.2] for name in names}, pathlib.Path('layers.png'), title='$')\n"
    )
    environment = {"MPLBACKEND": "module://a_notebook.inline", "MPLCONFIGDIR": str(tmp_path)}
    done = Forked(tmp_path, bare=True, code=code, environment=environment).wait()
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
