"""Standard error of FID over the images of the two sets."""

from __future__ import annotations

import numpy as np
import scipy.linalg
import torch

from eval.gaussian import Array, Features, GaussianStats

#: eigenvalues below this fraction of the largest count as zero
_ROUNDING = 1e-10


def frechet_error(
    a: Features, b: Features | None, stats_a: GaussianStats, stats_b: GaussianStats
) -> float:
    """Estimate the standard error of FID for other images of the same size, in closed form.

    The derivative of FID by the weight of image x of the first set is, up to a constant,

        i(x) = 2 (μ_a - μ_b)·(x - μ_a) + |x - μ_a|² - (x - μ_a)ᵀ T (x - μ_a)

    T carries N(0, S_a) onto N(0, S_b). With S_a = L Lᵀ and M = Lᵀ S_b L, Lᵀ T L is M^½. The
    inverse of T, for the second set, is L M^-½ Lᵀ. The infinitesimal jackknife takes var(i) / n
    of either set; it is the first order of the bootstrap.

    Args:
        a: features (n, d) of the first set.
        b: features (m, d) of the second set; None if only its statistics are known, which count as
            exact.
        stats_a: mean and covariance of the first set.
        stats_b: mean and covariance of the second set.

    Reference: Efron 1982 (infinitesimal jackknife).
    """
    first = _rows(a) - stats_a.mean
    shift, cov_b = stats_a.mean - stats_b.mean, stats_b.cov
    values, vectors = scipy.linalg.eigh(stats_a.cov)
    vectors = vectors[:, values > _ROUNDING * values[-1]]
    root = np.sqrt(values[values > _ROUNDING * values[-1]])
    if not len(root):  # the images are all equal
        return 0.0
    factor = vectors * root
    squares, axes = scipy.linalg.eigh(factor.T @ cov_b @ factor)
    axes = axes[:, squares > _ROUNDING * squares[-1]]
    roots = np.sqrt(squares[squares > _ROUNDING * squares[-1]])
    whitened = first @ (vectors / root) @ axes
    variance = _variance(2 * first @ shift + (first**2).sum(1) - whitened**2 @ roots)
    if b is not None:
        second = _rows(b) - stats_b.mean
        carried = second @ factor @ axes
        variance += _variance((second**2).sum(1) - 2 * second @ shift - carried**2 @ (1 / roots))
    return float(np.sqrt(variance))


def _rows(features: Features) -> Array:
    """Convert features to float64 (n, d)."""
    if isinstance(features, torch.Tensor):
        features = features.detach().cpu().double().numpy()
    return np.asarray(features, np.float64)


def _variance(influence: Array) -> float:
    """Compute the variance of the mean of the influences (n,)."""
    return float(influence.var(ddof=1)) / len(influence)
