"""Two-dimensional data sets: seeded samplers and, where known, their log-densities.

Most points of a set are within [-4, 4]², except those of `gaussian`, the setting of the released
code, with standard deviations 3.5 and 1.4 along the diagonals.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.toy2d.picture_densities import PictureDensity, rose_density, tree_density

#: samples n points, float32 (n, 2), with a generator
Sampler = Callable[[int, torch.Generator], Tensor]
#: maps points (n, 2) to log p in nats, (n,)
LogDensity = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class PointSet:
    """Point set: a distribution in the plane; its log-density is None without a closed form."""

    name: str
    sample: Sampler
    log_density: LogDensity | None = None


def point_set(name: str, path: str | Path | None = None) -> PointSet:
    """Return the point set of a key of `POINTS`, or of the `picture` in an image file.

    Raises:
        UserError: the name is unknown, or the picture has no path or is not readable.
    """
    if name == "picture":
        if path is None:
            raise UserError("data.path is null; set it to the image file of data.name=picture")
        picture = PictureDensity.from_file(Path(path).expanduser())
        return PointSet(name, picture.sample, picture.log_density)
    if name not in POINTS:
        known = ", ".join([*POINTS, "picture"])
        raise UserError(f"point set {name!r} is unknown; choose one of {known}")
    return PointSet(name, *POINTS[name])


def two_moons(n: int, generator: torch.Generator) -> Tensor:
    """Sample points (n, 2) of two interleaved half circles of radius 2, with noise 0.2."""
    angle = math.pi * torch.rand(n, generator=generator)
    lower = torch.randint(2, (n,), generator=generator).bool()
    x = torch.where(lower, 1 - angle.cos(), angle.cos()) - 0.5
    y = torch.where(lower, 0.5 - angle.sin(), angle.sin()) - 0.25
    return 2 * torch.stack([x, y], dim=1) + 0.2 * _normal(n, generator)


def checkerboard(n: int, generator: torch.Generator) -> Tensor:
    """Sample points (n, 2) uniformly on the eight dark squares of a 4 × 4 board on [-4, 4]²."""
    row = torch.randint(4, (n,), generator=generator)
    column = 2 * torch.randint(2, (n,), generator=generator) + row % 2
    inside = torch.rand((n, 2), generator=generator)
    return 2 * (torch.stack([column, row], dim=1) + inside) - 4


def checkerboard_log_density(points: Tensor) -> Tensor:
    """Return log(1/32) on the dark squares and -inf elsewhere, float64 (n,)."""
    square = ((points + 4) / 2).floor()
    dark = (square.sum(dim=1) % 2 == 0) & (square >= 0).all(dim=1) & (square < 4).all(dim=1)
    return torch.where(dark, -math.log(32), -math.inf).double()


_STD = 0.5 / math.sqrt(2)
_ANGLES = torch.arange(8) * (math.pi / 4)
_CENTRES = 4 / math.sqrt(2) * torch.stack([_ANGLES.cos(), _ANGLES.sin()], dim=1)


def eight_gaussians(n: int, generator: torch.Generator) -> Tensor:
    """Sample points (n, 2) of eight Gaussians of deviation 0.354 on a circle of radius 2.83."""
    return _CENTRES[torch.randint(8, (n,), generator=generator)] + _STD * _normal(n, generator)


def eight_gaussians_log_density(points: Tensor) -> Tensor:
    """Return the log-density of the mixture in nats, float64 (n,)."""
    squared = (points.double()[:, None] - _CENTRES.double()).square().sum(dim=2)
    log_each = -squared / (2 * _STD**2) - math.log(2 * math.pi * _STD**2) - math.log(8)
    return log_each.logsumexp(dim=1)


def swiss_roll(n: int, generator: torch.Generator) -> Tensor:
    """Sample points (n, 2) of the spiral r = t / 3.8, t in [1.5π, 4.5π], with noise 0.15."""
    t = 1.5 * math.pi * (1 + 2 * torch.rand(n, generator=generator))
    roll = torch.stack([t * t.cos(), t * t.sin()], dim=1) / 3.8
    return roll + 0.15 * _normal(n, generator)


def circles(n: int, generator: torch.Generator) -> Tensor:
    """Sample points (n, 2) of two circles of radius 3 and 1.5, with noise 0.2."""
    angle = 2 * math.pi * torch.rand(n, generator=generator)
    radius = 1.5 * (1 + torch.randint(2, (n,), generator=generator))
    ring = radius[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)
    return ring + 0.2 * _normal(n, generator)


def pinwheel(n: int, generator: torch.Generator) -> Tensor:
    """Sample points (n, 2) of five arms: radial Gaussians, rotated by an angle exp(r) / 4."""
    arm = torch.randint(5, (n,), generator=generator)
    local = _normal(n, generator) * torch.tensor([0.3, 0.1]) + torch.tensor([1.0, 0.0])
    angle = 2 * math.pi * arm / 5 + 0.25 * local[:, 0].exp()
    cos, sin = angle.cos(), angle.sin()
    x = cos * local[:, 0] - sin * local[:, 1]
    y = sin * local[:, 0] + cos * local[:, 1]
    return 2 * torch.stack([x, y], dim=1)


_COVARIANCE = ((7.0, 5.0), (5.0, 7.0))


def gaussian(n: int, generator: torch.Generator) -> Tensor:
    """Sample points (n, 2) of N(0, [[7, 5], [5, 7]])."""
    root = torch.linalg.cholesky(torch.tensor(_COVARIANCE))
    return _normal(n, generator) @ root.T


def gaussian_log_density(points: Tensor) -> Tensor:
    """Return the log-density of the Gaussian in nats, float64 (n,)."""
    covariance = torch.tensor(_COVARIANCE, dtype=torch.float64)
    solved = torch.linalg.solve(covariance, points.double().T).T
    squared = (points.double() * solved).sum(dim=1)
    return -(squared + torch.logdet(2 * math.pi * covariance)) / 2


def _of_picture(draw: Callable[[], PictureDensity]) -> tuple[Sampler, LogDensity]:
    """Return sampler and log-density of a picture, which is drawn at its first use."""
    return (lambda n, rng: draw().sample(n, rng)), (lambda points: draw().log_density(points))


#: sampler and, where it has a closed form, log-density
POINTS: dict[str, tuple[Sampler, LogDensity | None]] = {
    "two_moons": (two_moons, None),
    "checkerboard": (checkerboard, checkerboard_log_density),
    "8gaussians": (eight_gaussians, eight_gaussians_log_density),
    "swiss_roll": (swiss_roll, None),
    "circles": (circles, None),
    "pinwheel": (pinwheel, None),
    "gaussian": (gaussian, gaussian_log_density),
    "rose": _of_picture(rose_density),
    "tree": _of_picture(tree_density),
}


def _normal(n: int, generator: torch.Generator) -> Tensor:
    """Sample N(0, I), float32 (n, 2)."""
    return torch.randn((n, 2), generator=generator)
