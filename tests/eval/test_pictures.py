from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import eval.pictures as pictures


@pytest.fixture
def figures(monkeypatch):
    """Collects the figures that are saved."""
    saved = []
    save = pictures._save

    def keep(figure, file, **options):
        saved.append(figure)
        save(figure, file, **options)

    monkeypatch.setattr(pictures, "_save", keep)
    return saved


def blocks(n, channels=1):
    """n images of 3×2, each of one grey value."""
    values = np.arange(1, n + 1, dtype=np.uint8)[:, None, None, None]
    return np.broadcast_to(values, (n, channels, 3, 2)).copy()


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_puts_every_pixel_in_its_place(channels):
    picture = pictures.grid(torch.from_numpy(blocks(5, channels)), 3, padding=1, scale=2)
    assert picture.mode == ("L" if channels == 1 else "RGB")
    values = np.asarray(picture.convert("L"))[::2, ::2]
    expected = np.full((2 * 4 + 1, 3 * 3 + 1), 255)
    for i in range(5):
        row, column = divmod(i, 3)
        expected[4 * row + 1 : 4 * row + 4, 3 * column + 1 : 3 * column + 3] = i + 1
    assert np.array_equal(values, expected)
    assert pictures.grid(blocks(9)).size == (3 * 4 + 2, 3 * 5 + 2)  # 3 columns by default


def test_save_png_is_lossless(tmp_path):
    picture = pictures.grid(blocks(4))
    pictures.save_png(picture, tmp_path / "grid.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "grid.png")), np.asarray(picture))


def test_side_by_side_and_before_after(tmp_path, figures):
    both = pictures.side_by_side([pictures.grid(blocks(1)), pictures.grid(blocks(1, 3))], gap=4)
    assert both.mode == "RGB" and both.size == (6 + 4 + 6, 7)
    assert both.getpixel((2, 2)) == both.getpixel((12, 2)) == (1, 1, 1)
    pictures.before_after(tmp_path / "b.png", blocks(4), blocks(4), titles=("real", "decoded"))
    assert [a.get_title() for a in figures[0].axes] == ["real", "decoded"]
    assert Image.open(tmp_path / "b.png").format == "PNG"
    with pytest.raises(ValueError, match="two sets of one shape"):
        pictures.before_after(tmp_path / "b.png", blocks(4), blocks(3))


def test_movement_bars_draw_the_numbers(tmp_path, figures):
    movements = [[3.0, 2.0, 1.0], [2.0, 1.5]]
    pictures.movement_bars(tmp_path / "m.png", movements, ["iter 1", "r-iter 1"])
    (axes,) = figures[0].axes
    bars = [[(round(b.get_x() + b.get_width() / 2), b.get_height()) for b in c]
            for c in axes.containers]  # fmt: skip
    assert bars == [[(1, 3.0), (2, 2.0), (3, 1.0)], [(1, 2.0), (2, 1.5)]]
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["iter 1", "r-iter 1"]
    assert Image.open(tmp_path / "m.png").format == "PNG"


def test_curves_draw_the_numbers(figures):
    stream = io.BytesIO()
    pictures.curves(stream, {"a": ([1, 2], [3.0, 4.0])}, x_label="k", y_label="FID",
                    log_y=True, marks={"floor": 2.0})  # fmt: skip
    (axes,) = figures[0].axes
    assert axes.lines[0].get_xydata().tolist() == [[1, 3], [2, 4]]
    assert list(axes.lines[1].get_ydata()) == [2.0, 2.0]
    assert (axes.get_xlabel(), axes.get_yscale()) == ("k", "log")
    assert stream.getvalue().startswith(b"\x89PNG")


def test_animation_keeps_frames_and_times(tmp_path):
    frames = [pictures.grid(blocks(i)[-1:], scale=8) for i in (10, 100, 200)]
    pictures.animation(tmp_path / "a.gif", frames, seconds=0.1, hold=0.5)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 3 and gif.info["loop"] == 0
        seen = []
        for i in range(3):
            gif.seek(i)
            seen.append((gif.convert("L").getpixel((24, 24)), gif.info["duration"]))
    assert seen == [(10, 100), (100, 100), (200, 500)]


def test_global_state_is_left_alone():
    # `rcParams.copy` does not resolve the automatic backend, as `dict` would.
    code = (
        "import sys, io, matplotlib; before = matplotlib.rcParams.copy()\n"
        "from eval import pictures\n"
        "pictures.movement_bars(io.BytesIO(), [[1.0]])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert repr(matplotlib.rcParams.copy()) == repr(before)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_bad_input_is_named():
    sink = io.BytesIO()
    with pytest.raises(ValueError, match="expected uint8 images"):
        pictures.grid(np.zeros((2, 1, 3, 3)))
    with pytest.raises(ValueError, match="expected uint8 images"):
        pictures.grid(blocks(0))
    with pytest.raises(ValueError, match="1 or 3 channels, found 2"):
        pictures.grid(blocks(2, 2))
    with pytest.raises(ValueError, match="columns ≥ 1"):
        pictures.grid(blocks(2), 0)
    with pytest.raises(ValueError, match="2 passes of movements but 1 labels"):
        pictures.movement_bars(sink, [[1.0], [2.0]], ["a"])
    with pytest.raises(ValueError, match="at least one block"):
        pictures.movement_bars(sink, [[]])
    with pytest.raises(ValueError, match="line 'a'"):
        pictures.curves(sink, {"a": ([1, 2], [1.0])}, x_label="", y_label="")
    with pytest.raises(ValueError, match="two or more frames"):
        pictures.animation(sink, [pictures.grid(blocks(1))])
