"""Distances between two sets of features: of their Gaussians (FID) and kernel means (KID)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from eval.gaussian import Array, Features, GaussianStats
from eval.pairs import pair_of_features

#: rounding errors of a covariance and of d², relative to traces: float32 files reach 1e-7
_ROUNDING = 1e-6
#: fraction of a trace that a sample covariance may have outside its rank
_OUTSIDE_RANK = 1e-3


def frechet_distance(a: GaussianStats, b: GaussianStats) -> float:
    """Compute FID, the squared 2-Wasserstein distance of two Gaussians of one dimension d, ≥ 0.

        d² = |μ_a - μ_b|² + tr S_a + tr S_b - 2 tr (S_a S_b)^½

    S_a S_b has the eigenvalues of the symmetric matrix Lᵀ S_b L, where S_a = L Lᵀ. L = V √Λ comes
    from the eigenvectors of S_a; eigenvalues that rounding made negative count as zero. The
    covariance of n rows has rank n - 1 at most, so L keeps n - 1 columns, and the covariance of
    lower rank is factored. Thus no roots of rounding errors are summed.

    Raises:
        ValueError: the dimensions differ, a set has fewer than 2 images, or a covariance is not
            symmetric, not positive semidefinite, or of a higher rank than n - 1.

    Reference: Dowson, Landau 1982; Heusel et al. 2017.
    """
    if a.dim != b.dim:
        raise ValueError(
            f"the features have {a.dim} and {b.dim} dimensions; expected two sets of one dimension"
        )
    cov_a, cov_b = a.cov, b.cov
    if _rank(b) < _rank(a):
        root = _tr_root(cov_b, cov_a, _rank(b))
    else:
        root = _tr_root(cov_a, cov_b, _rank(a))
    shift = a.mean - b.mean
    traces = np.trace(cov_a) + np.trace(cov_b)
    distance = float(shift @ shift + traces - 2 * root)
    if distance < -_ROUNDING * traces:
        raise ValueError(
            f"the FID is {distance:.6g}; expected at least 0; the statistics are damaged, compute "
            "them again"
        )
    return max(distance, 0.0)


def _rank(stats: GaussianStats) -> int:
    """Bound the rank of a sample covariance."""
    return stats.dim if stats.n is None else min(stats.dim, stats.n - 1)


def _tr_root(first: Array, second: Array, rank: int) -> float:
    """Compute tr (first · second)^½ of two covariances (d, d); `rank` bounds the first's."""
    dim = len(first)
    keep = None if rank == dim else (dim - rank, dim - 1)
    _require_symmetric(first)
    _require_semidefinite(second)
    values, vectors = scipy.linalg.eigh(first, subset_by_index=keep, driver="evr")
    trace = np.trace(first)
    if values[0] < -_ROUNDING * trace:
        raise _covariance_error("has negative eigenvalues")
    if trace - values.sum() > _OUTSIDE_RANK * trace:
        raise ValueError(
            f"a covariance of n = {rank + 1} images has a higher rank than {rank}; expected the n "
            "of its images; compute the statistics again"
        )
    factor = vectors * np.sqrt(values.clip(min=0))
    product = factor.T @ second @ factor
    roots = scipy.linalg.eigvalsh(product, overwrite_a=True, check_finite=False)
    return float(np.sqrt(roots.clip(min=0)).sum())


def _require_symmetric(cov: Array) -> None:
    """Check that a covariance (d, d) is symmetric up to rounding."""
    if np.abs(cov - cov.T).max() > _ROUNDING * np.trace(cov):
        raise _covariance_error("is not symmetric")


def _require_semidefinite(cov: Array) -> None:
    """Check that a covariance (d, d) is symmetric and positive semidefinite up to rounding."""
    _require_symmetric(cov)
    shift = max(_ROUNDING * np.trace(cov), np.finfo(np.float64).tiny)
    try:
        scipy.linalg.cholesky(cov + shift * np.eye(len(cov)), overwrite_a=True)
    except scipy.linalg.LinAlgError:
        raise _covariance_error("has negative eigenvalues") from None


def _covariance_error(fault: str) -> ValueError:
    return ValueError(
        f"a covariance {fault}; expected a symmetric positive semidefinite matrix; the statistics "
        "are damaged, compute them again"
    )


@dataclass(frozen=True)
class Kid:
    """Kernel inception distance `value` ± `standard_error`, averaged over subsets."""

    value: float
    standard_error: float
    subsets: int
    subset_size: int


def kid(
    x: Features, y: Features, *, subsets: int = 50, subset_size: int = 1000, seed: int = 0
) -> Kid:
    """Compute KID of features (n_x, d) and (n_y, d): the unbiased squared MMD with a cubic kernel.

        k(x, y) = (xᵀy / d + 1)³
        KID = Σ_{i≠j} k(x_i, x_j) / m(m-1) + Σ_{i≠j} k(y_i, y_j) / m(m-1)
              - 2 Σ_{i,j} k(x_i, y_j) / m²

    It is averaged over ≥ 2 random subsets of m = `subset_size` rows, at most half of the smaller
    set. The subsets overlap, so the standard deviation s of their values is not the error of their
    mean. The delete-(n-m) jackknife s √(m / (n - m)), with n rows in the smaller set, estimates
    the error for other images.

    Raises:
        ValueError: a set has fewer than 4 rows, the shapes do not fit, or fewer than 2 subsets.

    Reference: Bińkowski et al. 2018; Shao, Wu 1989 (the jackknife).
    """
    x, y = pair_of_features(x, y, least=4)
    if subsets < 2 or subset_size < 2:
        raise ValueError(
            f"subsets is {subsets} and subset_size {subset_size}; expected at least 2 of each"
        )
    n = min(len(x), len(y))
    m = min(subset_size, n // 2)
    generator = torch.Generator().manual_seed(seed)
    values = np.empty(subsets)
    for i in range(subsets):
        xs = x[torch.randperm(len(x), generator=generator)[:m]]
        ys = y[torch.randperm(len(y), generator=generator)[:m]]
        within = _cubic_sum(xs, xs, drop=True) + _cubic_sum(ys, ys, drop=True)
        values[i] = within / (m * (m - 1)) - 2 * _cubic_sum(xs, ys) / m**2
    error = values.std(ddof=1) * np.sqrt(m / (n - m))
    return Kid(float(values.mean()), float(error), subsets, m)


def _cubic_sum(x: Tensor, y: Tensor, drop: bool = False) -> float:
    """Sum (xᵀy / d + 1)³ over all pairs, or over pairs of different rows."""
    gram = (x @ y.T / x.shape[1] + 1).double() ** 3
    return float(gram.sum() - (gram.trace() if drop else 0))
