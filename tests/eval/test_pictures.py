from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

import eval.pictures as pictures


def blocks(n, channels=1):
    """n images of 3×2, each of one grey value."""
    values = np.arange(1, n + 1, dtype=np.uint8)[:, None, None, None]
    return np.broadcast_to(values, (n, channels, 3, 2)).copy()


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_puts_every_pixel_in_its_place(channels):
    picture = pictures.image_grid(torch.from_numpy(blocks(5, channels)), 3, scale=2)
    assert picture.mode == ("L" if channels == 1 else "RGB")
    values = np.asarray(picture.convert("L"))[::2, ::2]
    expected = np.full((2 * 5 + 2, 3 * 4 + 2), 255)
    for i in range(5):
        row, column = divmod(i, 3)
        expected[5 * row + 2 : 5 * row + 5, 4 * column + 2 : 4 * column + 4] = i + 1
    assert np.array_equal(values, expected)
    assert pictures.image_grid(blocks(9)).size == (3 * 4 + 2, 3 * 5 + 2)  # 3 columns by default


def test_save_png_is_lossless(tmp_path):
    picture = pictures.image_grid(blocks(4))
    pictures.save_png(picture, tmp_path / "grid.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "grid.png")), np.asarray(picture))


def test_animation_keeps_frames_and_times(tmp_path):
    frames = [pictures.image_grid(blocks(i)[-1:], scale=8) for i in (10, 100, 200)]
    pictures.animation(tmp_path / "a.gif", frames, seconds=0.1, hold=0.5)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 3 and gif.info["loop"] == 0
        seen = []
        for i in range(3):
            gif.seek(i)
            seen.append((gif.convert("L").getpixel((24, 24)), gif.info["duration"]))
    assert seen == [(10, 100), (100, 100), (200, 500)]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_single_image_has_its_padding(channels):
    picture = pictures.image_grid(blocks(1, channels))
    assert picture.mode == ("L" if channels == 1 else "RGB")
    expected = np.full((3 + 4, 2 + 4), 255)
    expected[2:5, 2:4] = 1
    assert np.array_equal(np.asarray(picture.convert("L")), expected)


def test_bad_input_is_named():
    for bad in (np.zeros((2, 1, 3, 3)), blocks(0), blocks(2)[0]):
        with pytest.raises(ValueError, match=r"expected uint8 \(N, C, H, W\)"):
            pictures.image_grid(bad)
    with pytest.raises(ValueError, match="2 channels; expected 1 or 3"):
        pictures.image_grid(blocks(2, 2))
    with pytest.raises(ValueError, match="1 frames of 1 sizes; expected two or more"):
        pictures.animation(io.BytesIO(), [pictures.image_grid(blocks(1))])
