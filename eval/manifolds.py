"""Precision, recall, density and coverage of generated images, from balls around features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eval.gaussian import Features
from eval.pairs import pair_of_features

_CHUNK = 2048


@dataclass(frozen=True)
class ManifoldMetrics:
    """Metrics of generated against real images; every tensor has one term per image.

    Attributes:
        precise: whether a generated image lies inside the manifold of real ones, (m,).
        recalled: whether a real image lies inside the manifold of generated ones, (n,).
        dense: number of real balls that contain a generated image, divided by `k_density`, (m,).
        covered: whether the ball of a real image holds a generated one, (n,).
    """

    precise: Tensor
    recalled: Tensor
    dense: Tensor
    covered: Tensor

    @property
    def precision(self) -> float:
        """Fraction of generated images inside the manifold of real ones."""
        return float(self.precise.double().mean())

    @property
    def recall(self) -> float:
        """Fraction of real images inside the manifold of generated ones."""
        return float(self.recalled.double().mean())

    @property
    def density(self) -> float:
        """Mean number of real balls around a generated image, over k."""
        return float(self.dense.double().mean())

    @property
    def coverage(self) -> float:
        """Fraction of real balls that hold a generated image."""
        return float(self.covered.double().mean())


def manifold_metrics(
    real: Features, fake: Features, *, k: int = 3, k_density: int = 5
) -> ManifoldMetrics:
    """Estimate precision, recall, density and coverage of features real (n, d) and fake (m, d).

    A ball around a point reaches its k-th nearest other point of the same set; the balls of a set
    are its manifold. Precision and recall take k ≥ 1. Density and coverage take `k_density` ≥ 1,
    and n - 1 for sets that are smaller.

    Raises:
        ValueError: the shapes do not fit, or a set has k rows or fewer.

    Reference: Kynkäänniemi et al. 2019 (precision, recall); Naeem et al. 2020 (density, coverage).
    """
    if min(k, k_density) < 1:
        raise ValueError(f"k is {k} and k_density {k_density}; expected at least 1")
    real, fake = pair_of_features(real, fake, least=k + 1)
    # Distances are x² + y² - 2xy, which loses fewer digits for small norms.
    center = real.mean(0)
    real, fake = real - center, fake - center
    k_density = min(k_density, len(real) - 1)
    real_radius, wide_radius = _radii(real, (k, k_density))
    fake_radius = _radii(fake, (k,))[0]
    precise = torch.zeros(len(fake), dtype=torch.bool)
    dense = torch.zeros(len(fake))
    recalled, covered = [], []
    for start in range(0, len(real), _CHUNK):
        rows = slice(start, start + _CHUNK)
        squared = _squared(real[rows], fake)
        precise |= (squared <= real_radius[rows, None]).any(0)
        recalled.append((squared <= fake_radius).any(1))
        inside = squared <= wide_radius[rows, None]
        dense += inside.sum(0)
        covered.append(inside.any(1))
    return ManifoldMetrics(precise, torch.cat(recalled), dense / k_density, torch.cat(covered))


def _radii(x: Tensor, ks: tuple[int, ...]) -> list[Tensor]:
    """Compute the squared distances (n,) of each row of x (n, d) to its k-th nearest others."""
    radii: list[list[Tensor]] = [[] for _ in ks]
    for start in range(0, len(x), _CHUNK):
        squared = _squared(x[start : start + _CHUNK], x)
        squared[torch.arange(len(squared)), torch.arange(start, start + len(squared))] = torch.inf
        nearest = squared.topk(max(ks), dim=1, largest=False).values
        for parts, k in zip(radii, ks, strict=True):
            parts.append(nearest[:, k - 1])
    return [torch.cat(parts) for parts in radii]


def _squared(x: Tensor, y: Tensor) -> Tensor:
    """Compute the squared distances (n, m) between rows of x (n, d) and of y (m, d)."""
    return torch.addmm((x * x).sum(1)[:, None] + (y * y).sum(1), x, y.T, alpha=-2).clamp_(min=0)
