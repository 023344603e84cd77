"""Pictures of points: what lands where, read back from the pixels."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from eval.pictures import animation
from eval.plots2d import (
    Panel,
    density,
    frames,
    samples_and_densities,
    scatter,
    trajectories,
    window,
)


def blob(x, y, n=400, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor([x, y]) + 0.1 * torch.randn((n, 2), generator=generator)


def centre_of(ink):
    """Where the ink is, as fractions of width and of height from below."""
    rows, columns = np.indices(ink.shape)
    total = ink.sum()
    down = (rows * ink).sum() / total / ink.shape[0]
    return (columns * ink).sum() / total / ink.shape[1], 1 - down


def coloured(draw):
    """Only the coloured ink: axes and titles are grey."""
    file = io.BytesIO()
    draw(file)
    rgb = np.asarray(Image.open(file).convert("RGB"), float)
    return (rgb.max(axis=2) - rgb.min(axis=2)) / 255


def cropped(ink):
    """The coloured rectangle of one panel."""
    rows, columns = np.nonzero(ink.max(axis=1) > 0.1)[0], np.nonzero(ink.max(axis=0) > 0.1)[0]
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def test_window_holds_the_points_but_not_the_strays():
    x = torch.rand((5000, 2), generator=torch.Generator().manual_seed(0)) * 4 - 2
    low, high = window(torch.cat([x, torch.tensor([[50.0, 0.0], [float("nan"), 0.0]])]))
    assert -2.5 < low < -2 and 2 < high < 2.5
    with pytest.raises(ValueError, match="0 finite points"):
        window(torch.full((3, 2), float("nan")))


def test_scatter_draws_each_set_in_its_panel_the_right_way_up():
    panels = [("upper right", blob(2, 2)), ("lower left", blob(-2, -2))]
    ink = coloured(lambda file: scatter(file, panels, (-4, 4)))
    half = ink.shape[1] // 2
    right, up = centre_of(ink[:, :half])
    assert right > 0.6 and up > 0.55
    right, up = centre_of(ink[:, half:])
    assert right < 0.4 and up < 0.45


def test_density_stands_beside_the_data_in_the_same_place():
    """A Gaussian's log-density on the grid and its samples colour the same spot alike."""
    centre, spread, count = torch.tensor([2.0, -1.0]), 0.5, 40
    generator = torch.Generator().manual_seed(0)
    data = centre + spread * torch.randn((100000, 2), generator=generator)
    axis = -4 + 8 / count * (np.arange(count) + 0.5)
    x, y = np.meshgrid(axis, axis)
    squared = (x - 2) ** 2 + (y + 1) ** 2
    log_density = -squared / (2 * spread**2) - np.log(2 * np.pi * spread**2)
    ink = coloured(lambda file: density(file, data, log_density, (-4, 4)))
    left, right = (cropped(half) for half in np.array_split(ink, 2, axis=1))
    assert centre_of(left > 0.4) == pytest.approx((6 / 8, 3 / 8), abs=0.02)
    assert centre_of(right > 0.4) == pytest.approx((6 / 8, 3 / 8), abs=0.02)
    assert (left > 0.4).mean() == pytest.approx((right > 0.4).mean(), rel=0.1)
    with pytest.raises(ValueError, match=r"expected \(G, G\)"):
        density(io.BytesIO(), data, np.zeros((3, 4)), (-4, 4))


def test_samples_stand_above_their_density():
    """Dots, their histogram and a given density colour the same spot of each column."""
    points = blob(2, -1)
    axis = -4 + 8 / 40 * (np.arange(40) + 0.5)
    x, y = np.meshgrid(axis, axis)
    log_density = -((x + 2) ** 2 + (y - 1) ** 2) / 0.02
    columns = [Panel("data", points), Panel("model", blob(-2, 1), log_density)]
    ink = coloured(lambda file: samples_and_densities(file, columns, (-4, 4)))
    for half, x_of, y_of in zip(np.array_split(ink, 2, axis=1), (6, 2), (3, 5), strict=True):
        spots = [centre_of(row > 0.3) for row in np.array_split(half, 2)]
        assert spots[0] == pytest.approx(spots[1], abs=0.06)
        assert (spots[0][0] > 0.5) == (x_of > 4) and (spots[0][1] > 0.5) == (y_of > 4)
    with pytest.raises(ValueError, match=r"expected \(G, G\)"):
        bad = [Panel("data", points), Panel("model", points, np.zeros((3, 4)))]
        samples_and_densities(io.BytesIO(), bad, (-4, 4))


def test_trajectories_show_both_ways():
    """Forward moves right, backward left; the second row is the way back."""
    forward = [blob(x, 0) for x in (-2, 0, 2)]
    ink = coloured(lambda file: trajectories(file, forward, forward[::-1], (-4, 4)))
    rows = np.array_split(ink, 2)
    for row, way in zip(rows, (1, -1), strict=True):
        spots = [centre_of(panel)[0] for panel in np.array_split(row, 3, axis=1)]
        assert (np.diff(spots) * way > 0.1).all()
    with pytest.raises(ValueError, match="3 forward and 2 backward"):
        trajectories(io.BytesIO(), forward, forward[:2], (-4, 4))


def test_frames_make_an_animation(tmp_path):
    states = [blob(x, 0) for x in (-2, 0, 2)]
    pictures = frames(states, (-4, 4), ["a", "b", "c"])
    assert {p.size for p in pictures} == {(320, 320)}
    path = tmp_path / "way.gif"
    animation(path, pictures)
    with Image.open(path) as film:
        assert film.n_frames == 3
        spots = []
        for index in range(3):
            film.seek(index)
            rgb = np.asarray(film.convert("RGB"), float)
            spots.append(centre_of(rgb.max(axis=2) - rgb.min(axis=2))[0])
    assert spots == sorted(spots) and spots[2] - spots[0] > 0.3


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda file: scatter(file, [], (-1, 1)), "0 panels"),
        (lambda file: samples_and_densities(file, [], (-1, 1)), "0 panels"),
        (lambda file: scatter(file, [("3-D", torch.zeros(4, 3))], (-1, 1)), r"shape \(4, 3\)"),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(ValueError, match=words):
        call(io.BytesIO())
