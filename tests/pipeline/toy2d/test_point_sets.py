"""Point sets against their own geometry, and their densities against counts and integrals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from eval.mmd import mmd
from pipeline.errors import UserError
from pipeline.toy2d.picture_densities import PictureDensity
from pipeline.toy2d.point_sets import POINTS, point_set

KNOWN = [name for name, (_, density) in POINTS.items() if density is not None]


def draw(name, n=20000, seed=0, **options):
    return point_set(name, **options).sample(n, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", POINTS)
def test_points_come_from_the_generator_and_fill_the_window(name):
    x = draw(name)
    assert x.shape == (20000, 2) and x.dtype == torch.float32
    assert torch.equal(x, draw(name)) and not torch.equal(x, draw(name, seed=1))
    inside = (x.abs() <= 4).all(dim=1).float().mean()
    if name == "gaussian":
        torch.testing.assert_close(
            torch.cov(x.T), torch.tensor([[7.0, 5.0], [5.0, 7.0]]), rtol=0.05, atol=0
        )
    else:
        assert inside > 0.99 and x.abs().max() > 2.5


def test_points_follow_their_formulas():
    moons = draw("two_moons")
    centre = torch.where(moons[:, 1] > 0, -1.0, 1.0)  # the tips, which cross, are left out
    radius = torch.hypot(moons[:, 0] - centre, moons[:, 1] - 0.5 * centre)
    clear = moons[:, 1].abs() > 0.8
    assert (radius[clear] - 2).abs().mean() < 0.2
    ring = draw("circles").norm(dim=1)
    assert ((ring - 3).abs() < 0.8).float().mean() == pytest.approx(0.5, abs=0.02)
    assert ((ring - 1.5).abs() < 0.7).float().mean() == pytest.approx(0.5, abs=0.02)
    roll = draw("swiss_roll")
    turn = torch.atan2(roll[:, 1], roll[:, 0])
    laps = (3.8 * roll.norm(dim=1) - turn) / (2 * math.pi)  # r = t / 3.8 and t = angle + 2π lap
    assert (laps - laps.round()).abs().median() < 0.1
    arms = draw("pinwheel")
    fifth = torch.tensor(2 * math.pi / 5)
    turned = arms @ torch.tensor([[fifth.cos(), fifth.sin()], [-fifth.sin(), fifth.cos()]])
    for points in (arms, turned):  # a fifth of a turn changes nothing
        counts = torch.histogramdd(points, [8, 8], range=[-4.0, 4.0, -4.0, 4.0]).hist
        reference = torch.histogramdd(draw("pinwheel", seed=5), [8, 8], range=[-4.0, 4.0] * 2).hist
        assert (counts - reference).abs().sum() / 20000 < 0.08


@pytest.mark.parametrize("name", KNOWN)
def test_densities_integrate_to_one(name):
    half = 14.0 if name == "gaussian" else 5.0
    step = 2 * half / 640
    axis = -half + step * (torch.arange(640, dtype=torch.float64) + 0.5)
    grid = torch.cartesian_prod(axis, axis)
    mass = point_set(name).log_density(grid).exp().sum() * step**2
    # The pixels of a picture and the grid's do not line up; squares and Gaussians do.
    assert float(mass) == pytest.approx(1.0, abs=0.02 if name in ("rose", "tree") else 1e-3)


@pytest.mark.parametrize("name", KNOWN)
def test_density_agrees_with_counts(name):
    """Probability of the squares of a coarse grid: as sampled, and as the density says."""
    n, half, cells, fine = 200000, 4.0, 8, 400
    x = draw(name, n).double()
    counted = torch.histogramdd(x, [cells, cells], range=[-half, half] * 2).hist / n
    axis = -half + 2 * half / fine * (torch.arange(fine, dtype=torch.float64) + 0.5)
    density = point_set(name).log_density(torch.cartesian_prod(axis, axis)).exp()
    share = density.view(cells, fine // cells, cells, fine // cells).sum((1, 3))
    share *= (2 * half / fine) ** 2
    torch.testing.assert_close(counted, share, rtol=0.06, atol=2e-3)


def entropy(name, n):
    """Monte-Carlo entropy −E log p in nats."""
    return -float(point_set(name).log_density(draw(name, n)).double().mean())


def test_entropies_equal_closed_forms():
    assert entropy("checkerboard", 1000) == pytest.approx(math.log(32))
    exact = 0.5 * math.log((2 * math.pi * math.e) ** 2 * 24)
    assert entropy("gaussian", 200000) == pytest.approx(exact, abs=0.01)
    # Eight components that do not overlap: one Gaussian's entropy and the choice among them.
    apart = math.log(2 * math.pi * math.e * 0.125) + math.log(8)
    assert entropy("8gaussians", 200000) == pytest.approx(apart, abs=0.03)


def test_a_picture_file_becomes_its_density(tmp_path):
    """A 2 × 4 picture: dark pixels draw points in proportion, on the side where they are."""
    grey = np.array([[255, 155, 255, 255], [255, 255, 255, 55]], np.uint8)  # ink 100 and 200
    path = tmp_path / "two.png"
    Image.fromarray(grey).save(path)
    points = point_set("picture", path)
    x = points.sample(30000, torch.Generator().manual_seed(0))
    left = x[:, 0] < 0
    assert left.float().mean() == pytest.approx(1 / 3, abs=0.01)
    # Both axes span [-4, 4], so a pixel is 2 wide and 4 high: second column, upper row.
    assert x[left].min(dim=0).values.tolist() == pytest.approx([-2, 0], abs=0.01)
    assert x[left].max(dim=0).values.tolist() == pytest.approx([0, 4], abs=0.01)
    assert x[~left].min(dim=0).values.tolist() == pytest.approx([2, -4], abs=0.01)
    torch.testing.assert_close(
        points.log_density(torch.tensor([[-1.0, 1.0], [3.0, -1.0], [1.0, 1.0], [9.0, 0.0]])),
        torch.tensor([1 / 24, 1 / 12, 0.0, 0.0], dtype=torch.float64).log(),
    )
    empty = point_set("picture", path).log_density(torch.tensor([[1.0, -1.0]]))
    assert empty.item() == -math.inf


def test_darkness_is_relative_to_the_lightest_pixel(tmp_path):
    path = tmp_path / "grey.png"
    Image.fromarray(np.array([[200, 100], [200, 200]], np.uint8)).save(path)
    x = draw("picture", 200, path=path)
    assert (x[:, 0] >= 0).all() and (x[:, 1] >= 0).all()


def test_a_picture_is_the_density_of_the_released_code(tmp_path):
    """There, a pixel is a Gaussian of half its size around a node of a grid on [-4, 4]²."""
    y, x = np.mgrid[0:40, 0:64]
    grey = np.where((x - 20) ** 2 + 2 * (y - 15) ** 2 < 150, 30, 240) - x
    path = tmp_path / "blob.png"
    Image.fromarray(grey.astype(np.uint8)).save(path)
    rng = np.random.default_rng(0)
    ink = (grey.max() - grey).astype(float).ravel()
    chosen = rng.choice(ink.size, 2000, p=ink / ink.sum())
    across, down = np.linspace(-4, 4, 64)[chosen % 64], np.linspace(4, -4, 40)[chosen // 64]
    nodes = np.stack([across, down], axis=1)
    theirs = nodes + rng.normal(size=nodes.shape) * [4 / 64, 4 / 40]
    ours = draw("picture", 2000, path=path)
    result = mmd(theirs, ours, scale=0.1)
    assert result.value < result.threshold
    squashed = mmd(theirs * [1, 40 / 64], ours, scale=0.1)  # without the stretch
    assert squashed.value > squashed.threshold


def test_a_picture_of_16_bits_has_its_grey_levels(tmp_path):
    """The upper half is black, the lower half white."""
    levels = np.repeat(np.array([0, 65535], np.uint16), 8)[:, None].repeat(16, axis=1)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    x = draw("picture", 100, path=tmp_path / "deep.png")
    grey = np.repeat(np.array([30000, 60000], np.uint16), 8)[:, None].repeat(16, axis=1)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    y = draw("picture", 100, path=tmp_path / "grey.png")
    assert (x[:, 1] > 0).all() and (y[:, 1] > 0).all()


def test_transparent_pixels_have_no_density(tmp_path):
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0, 3] = 255  # one black pixel, the others transparent
    Image.fromarray(rgba, "RGBA").save(tmp_path / "dot.png")
    x = draw("picture", 100, path=tmp_path / "dot.png")
    assert (x[:, 0] <= 0).all() and (x[:, 1] >= 0).all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda folder: point_set("moons"), "'moons' is unknown; choose one of two_moons"),
        (lambda folder: point_set("picture"), "data.path is null"),
        (lambda folder: point_set("picture", folder / "none.png"), "does not exist"),
        (lambda folder: point_set("picture", folder / "text.png"), "not a readable picture"),
        (lambda folder: point_set("picture", folder / "blank.png"), "is blank"),
        (lambda folder: PictureDensity.from_ink(np.array([[1.0, -1.0]])), "expected non-negative"),
    ],
)
def test_invalid_settings_are_one_sentence(tmp_path, call, words):
    (tmp_path / "text.png").write_text("no pixels")
    Image.new("L", (3, 3), 255).save(tmp_path / "blank.png")
    with pytest.raises(UserError, match=words) as caught:
        call(tmp_path)
    assert "\n" not in str(caught.value)
