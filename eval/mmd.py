"""Maximum mean discrepancy of two samples, with the threshold of a two-sample test."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_CHUNK = 1024
_MEDIAN_ROWS = 2000


@dataclass(frozen=True)
class Mmd:
    """Squared MMD of two samples, with the kernel's bandwidth σ.

    Above `threshold` the test rejects that both samples have one distribution.
    """

    value: float
    threshold: float
    bandwidth: float


def mmd(
    x: Tensor | npt.NDArray[np.floating],
    y: Tensor | npt.NDArray[np.floating],
    *,
    scale: float = 1.0,
    bandwidth: float | None = None,
    alpha: float = 0.05,
    permutations: int = 500,
    seed: int = 0,
) -> Mmd:
    """Compute the biased squared MMD of x (n, D) and y (m, D), and its permutation threshold.

        k(x, y) = exp(-|x - y|² / 2σ²)
        MMD² = Σ k(x_i, x_j) / n² + Σ k(y_i, y_j) / m² - 2 Σ k(x_i, y_j) / nm

    This is a V-statistic: the sums include the diagonals, so MMD² ≥ 0. σ is `bandwidth`, or else
    `scale` times the median distance within the pooled sample; 0.1 compares details, 1 the overall
    shape. The permutation threshold τ is the 1 - α quantile of MMD² between random divisions of
    the pool into n and m points. Two samples of one distribution exceed it with probability α.
    With weights w (1/n and -1/m) on the pool, each MMD² is wᵀKw.

    Raises:
        ValueError: a shape or an argument is out of range, or all points are equal.

    Reference: Gretton et al. 2012, §2 and §5.
    """
    x, y = (torch.as_tensor(t).detach().cpu().double() for t in (x, y))
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(
            f"the samples have the shapes {tuple(x.shape)} and {tuple(y.shape)}; expected (n, D) "
            "and (m, D) with one D, n ≥ 2 and m ≥ 2"
        )
    if not (0 < alpha < 1 and permutations >= 1):
        raise ValueError(
            f"alpha is {alpha} and permutations {permutations}; expected 0 < alpha < 1 and at "
            "least 1"
        )
    pool = torch.cat([x, y])
    sigma = scale * median_distance(pool, seed) if bandwidth is None else bandwidth
    if not sigma > 0:
        cause = "; half of the points or more are equal" if bandwidth is None and scale > 0 else ""
        raise ValueError(f"the bandwidth is {sigma}; expected a positive number{cause}")
    n, m = len(x), len(y)
    rng = np.random.default_rng(seed)
    observed = np.concatenate([np.full(n, 1 / n), np.full(m, -1 / m)])[:, None]
    divisions = rng.permuted(np.broadcast_to(observed, (n + m, permutations)), axis=0)
    weights = torch.from_numpy(np.concatenate([observed, divisions], axis=1))
    values = _quadratic(pool, weights, sigma).numpy()
    threshold = float(np.quantile(values[1:], 1 - alpha))
    return Mmd(max(float(values[0]), 0.0), threshold, float(sigma))


def median_distance(points: Tensor, seed: int = 0) -> float:
    """Compute the median distance between rows of points (n, D), from at most 2 000 rows."""
    if len(points) > _MEDIAN_ROWS:
        generator = torch.Generator().manual_seed(seed)
        points = points[torch.randperm(len(points), generator=generator)[:_MEDIAN_ROWS]]
    return float(np.median(torch.pdist(points).numpy()))


def _quadratic(pool: Tensor, weights: Tensor, sigma: float) -> Tensor:
    """Compute wᵀKw for every column w of weights (N, R), a chunk of K at a time."""
    total = torch.zeros(weights.shape[1], dtype=torch.float64)
    for start in range(0, len(pool), _CHUNK):
        rows = slice(start, start + _CHUNK)
        distance = torch.cdist(pool[rows], pool, compute_mode="donot_use_mm_for_euclid_dist")
        kernel = distance.square_().mul_(-0.5 / sigma**2).exp_()
        total += (weights[rows] * (kernel @ weights)).sum(0)
    return total
