from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import eval.plots as plots


@pytest.fixture
def figures(monkeypatch):
    """Collects the figures that are saved."""
    saved = []
    save = plots.save_figure

    def keep(figure, file, **options):
        saved.append(figure)
        save(figure, file, **options)

    monkeypatch.setattr(plots, "save_figure", keep)
    return saved


def greys(n):
    return np.arange(6 * n, dtype=np.uint8).reshape(n, 1, 3, 2)


def test_before_after_stand_under_their_titles(tmp_path, figures):
    plots.before_after(tmp_path / "b.png", greys(4), greys(4), titles=("real", "decoded"))
    assert [a.get_title() for a in figures[0].axes] == ["real", "decoded"]
    assert Image.open(tmp_path / "b.png").format == "PNG"
    with pytest.raises(ValueError, match="expected one shape"):
        plots.before_after(tmp_path / "b.png", greys(4), greys(3), titles=("real", "decoded"))


def test_movement_bars_draw_the_numbers(tmp_path, figures):
    movements = [[3.0, 2.0, 1.0], [2.0, 1.5]]
    plots.movement_bars(tmp_path / "m.png", movements, ["iter 1", "r-iter 1"])
    (axes,) = figures[0].axes
    bars = [[(round(b.get_x() + b.get_width() / 2), b.get_height()) for b in c]
            for c in axes.containers]  # fmt: skip
    assert bars == [[(0, 3.0), (1, 2.0), (2, 1.0)], [(0, 2.0), (1, 1.5)]]
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["iter 1", "r-iter 1"]
    assert Image.open(tmp_path / "m.png").format == "PNG"


def test_curves_draw_the_numbers(figures):
    stream = io.BytesIO()
    lines = {"a": ([1, 2], [3.0, 4.0]), "b": ([1], [2.0])}
    plots.curves(stream, lines, x_label="k", y_label="FID")
    (axes,) = figures[0].axes
    assert axes.lines[0].get_xydata().tolist() == [[1, 3], [2, 4]]
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["a", "b"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("k", "FID")
    assert stream.getvalue().startswith(b"\x89PNG")


def test_curves_of_eight_models_differ(figures):
    lines = {str(i): ([1, 2], [10.0**i, 1.0]) for i in range(8)}
    plots.curves(io.BytesIO(), lines, x_label="s", y_label="MMD²", log_y=True)
    (axes,) = figures[0].axes
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == 8
    assert axes.get_yscale() == "log"


def test_global_state_is_left_alone():
    # `rcParams.copy` does not resolve the automatic backend, as `dict` would.
    code = (
        "import sys, io, matplotlib; before = matplotlib.rcParams.copy()\n"
        "from eval import plots\n"
        "plots.movement_bars(io.BytesIO(), [[1.0]], ['iter 1'])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert repr(matplotlib.rcParams.copy()) == repr(before)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_bad_input_is_named():
    sink = io.BytesIO()
    with pytest.raises(ValueError, match="blocks; expected at least one pass"):
        plots.movement_bars(sink, [[]], ["a"])
    with pytest.raises(ValueError, match="0 lines; expected at least one"):
        plots.curves(sink, {}, x_label="", y_label="")
