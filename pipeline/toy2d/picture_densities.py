"""Densities in the plane that are proportional to the darkness of a grey picture.

`rose_density` and `tree_density` are drawn by formulas, as in the image experiments of the paper.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

from pipeline.data.image_folder import to_8_bit
from pipeline.errors import UserError
from pipeline.integrity.pictures import DAMAGE, open_picture

#: half the side of a picture, in coordinates of the plane
HALF = 4.0
_LARGEST = 512
_SIDE = 256


@dataclass(frozen=True)
class PictureDensity:
    """Density that is constant on every pixel of a picture that is stretched to [-4, 4]².

    The authors of JKO-iFlow stretch both axes so, too, and take the darkness relative to the
    lightest pixel. They blur each pixel by a Gaussian of half its size, where this is constant.

    Attributes:
        weights: probability of each pixel, float64 (H, W), first row on top, sum 1.

    Reference: the released code of JKO-iFlow, `main.py`.
    """

    weights: Tensor

    @property
    def pixel(self) -> tuple[float, float]:
        """The width and the height of a pixel in the plane."""
        height, width = self.weights.shape
        return 2 * HALF / width, 2 * HALF / height

    @classmethod
    def from_ink(cls, ink: npt.NDArray[np.floating]) -> PictureDensity:
        """Return the density proportional to ink (H, W).

        Raises:
            UserError: ink is negative, not finite or zero everywhere.
        """
        ink = np.asarray(ink, np.float64)
        if ink.ndim != 2 or not np.isfinite(ink).all() or (ink < 0).any() or not ink.sum() > 0:
            raise UserError(
                f"ink of shape {ink.shape} is negative, not finite or zero everywhere; expected "
                "non-negative values with a positive sum"
            )
        return cls(torch.from_numpy(ink / ink.sum()))

    @classmethod
    def from_file(cls, path: Path) -> PictureDensity:
        """Read an image file of any size and mode, reduced to 512 pixels; transparency is white.

        Raises:
            UserError: the file is absent, not an image, or of one colour.
        """
        try:
            with open_picture(path) as file:
                grey = to_8_bit(file, "L")
        except FileNotFoundError as error:
            raise UserError(f"picture {path} does not exist; check data.path") from error
        except DAMAGE as error:
            raise UserError(
                f"{path} is not a readable picture; expected an image file; check data.path"
            ) from error
        grey.thumbnail((_LARGEST, _LARGEST))
        levels = np.asarray(grey, np.float64)
        ink = levels.max() - levels
        if not ink.any():
            raise UserError(
                f"{path} is blank, of one colour; expected dark pixels; give another picture"
            )
        return cls.from_ink(ink)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Sample points, float32 (n, 2): a pixel by its weight, then uniformly in the pixel."""
        cumulative = self.weights.flatten().cumsum(0)
        levels = torch.rand(n, generator=generator, dtype=torch.float64) * cumulative[-1]
        index = torch.searchsorted(cumulative, levels, right=True).clamp(max=len(cumulative) - 1)
        height, width = self.weights.shape
        jitter = torch.rand((n, 2), generator=generator, dtype=torch.float64)
        across, down = self.pixel
        x = (index % width + jitter[:, 0] - width / 2) * across
        y = (height / 2 - index // width - jitter[:, 1]) * down
        return torch.stack([x, y], dim=1).float()

    def log_density(self, points: Tensor) -> Tensor:
        """Return log p at points (n, 2) in nats, float64 (n,); -inf without ink."""
        height, width = self.weights.shape
        across, down = self.pixel
        scaled = points.double() / torch.tensor([across, down], dtype=torch.float64)
        column = (scaled[:, 0] + width / 2).floor().long()
        row = (height / 2 - scaled[:, 1]).ceil().long() - 1
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        weights = self.weights[row.clamp(0, height - 1), column.clamp(0, width - 1)]
        density = torch.where(inside, weights, torch.zeros_like(weights)) / (across * down)
        return density.log()


@lru_cache
def rose_density() -> PictureDensity:
    """Return the density of a rose seen from above: whorls of petals, darker at their rims.

    The rim of whorl l at angle θ has radius R_l (0.76 + 0.24 |cos(m_l θ / 2 + φ_l)|), a rhodonea
    curve. Inner whorls cover outer ones, and each is rotated by half a petal.
    """
    axis = (np.arange(_SIDE) + 0.5) / _SIDE * 2 - 1
    x, y = np.meshgrid(axis, -axis)
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    ink = np.zeros((_SIDE, _SIDE))
    for layer, (reach, petals) in enumerate([(0.98, 7), (0.74, 6), (0.53, 5), (0.34, 4)]):
        lobes = np.abs(np.cos(petals * angle / 2 + layer * math.pi / 3))
        inside = radius / (reach * (0.76 + 0.24 * lobes))
        # A petal is light at its centre and dark at its rim, with a shadow between two petals.
        shade = 0.12 + 0.88 * np.clip(inside, 0, 1) ** 5 + 0.35 * (1 - lobes) ** 3
        ink = np.where(inside < 1, shade, ink)
    ink = np.where(radius < 0.13, 1.2 * np.clip(radius / 0.13, 0.15, 1), ink)
    return PictureDensity.from_ink(ink)


@lru_cache
def tree_density() -> PictureDensity:
    """Return the density of a fractal tree: a branch splits into two thinner ones, nine times."""
    size = 4 * _SIDE  # drawn large and reduced, for smooth twigs
    canvas = Image.new("L", (size, size), 0)
    pen = ImageDraw.Draw(canvas)

    def draw_branch(x: float, y: float, angle: float, length: float, depth: int) -> None:
        end = (x + length * math.cos(angle), y - length * math.sin(angle))
        width = max(3, round(0.13 * length))
        pen.line([(x, y), end], fill=255, width=width)
        radius = width / 2
        pen.ellipse([end[0] - radius, end[1] - radius, end[0] + radius, end[1] + radius], fill=255)
        if depth:
            draw_branch(*end, angle + 0.48, 0.76 * length, depth - 1)
            draw_branch(*end, angle - 0.40, 0.72 * length, depth - 1)

    draw_branch(0.52 * size, 0.99 * size, math.pi / 2, 0.26 * size, 9)
    small = canvas.filter(ImageFilter.GaussianBlur(4)).resize((_SIDE, _SIDE), Image.Resampling.BOX)
    return PictureDensity.from_ink(np.asarray(small, np.float64))
