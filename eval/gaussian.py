"""The mean and covariance of features, accumulated in float64, and their files."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
from torch import Tensor

Array = npt.NDArray[np.float64]
Features = Tensor | npt.NDArray[np.floating]

_BLOCK = 1024


class GaussianStats:
    r"""Streaming sample mean and covariance of rows in R^d.

    After rows f_1 … f_n: mean = Σ f_i / n, cov = Σ (f_i - mean)(f_i - mean)ᵀ / (n - 1), as
    `numpy.cov` and pytorch-fid have it. Rows are gathered into blocks of fixed length, each
    added by the update of two samples' moments

        M_{ab} = M_a + M_b + δδᵀ · n_a n_b / (n_a + n_b),   δ = mean_b - mean_a,

    so the same rows in the same order give the same bits however they were split.

    Args:
        dim: d, 2048 for Inception features.

    Reference: Chan, Golub, LeVeque 1983.
    """

    def __init__(self, dim: int = 2048) -> None:
        """Start with no rows."""
        self.dim = dim
        self._n: int | None = 0
        self._mean: Array = np.zeros(dim)
        self._scatter: Array = np.zeros((dim, dim))
        self._waiting: list[Array] = []
        self._count_waiting = 0

    @classmethod
    def from_features(cls, features: Features) -> GaussianStats:
        """Accumulate all rows of features (n, d)."""
        stats = cls(features.shape[1])
        stats.update(features)
        return stats

    @classmethod
    def from_moments(cls, mean: npt.ArrayLike, cov: npt.ArrayLike, n: int | None) -> GaussianStats:
        """Wrap a known mean (d,) and covariance (d, d).

        Args:
            mean: the mean.
            cov: the covariance, with divisor n - 1.
            n: how many rows it came from; None when unknown (then no rows can be added).

        Raises:
            ValueError: shapes that do not fit, numbers that are not finite, or n < 2.
        """
        mean, cov = np.array(mean, np.float64), np.array(cov, np.float64)
        if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
            raise ValueError(
                f"expected a mean (d,) and a covariance (d, d), found {mean.shape}, {cov.shape}"
            )
        if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
            raise ValueError("the statistics hold NaN or infinity; compute them again")
        if n is not None and n < 2:
            raise ValueError(f"a covariance needs at least 2 images, found n = {n}")
        stats = cls(len(mean))
        stats._n, stats._mean, stats._scatter = n, mean, cov * (1 if n is None else n - 1)
        return stats

    @property
    def n(self) -> int | None:
        """How many rows were seen; None for a file that does not say."""
        return None if self._n is None else self._n + self._count_waiting

    @property
    def mean(self) -> Array:
        """The mean (d,), float64."""
        self._flush()
        return self._mean.copy()

    @property
    def cov(self) -> Array:
        """The covariance (d, d), float64, divisor n - 1.

        Raises:
            ValueError: fewer than two rows were seen.
        """
        self._flush()
        if self._n is None:
            return self._scatter.copy()
        if self._n < 2:
            raise ValueError(f"a covariance needs at least 2 images, found n = {self._n}")
        return self._scatter / (self._n - 1)

    def update(self, features: Features) -> None:
        """Add rows (B, d), B ≥ 0.

        Raises:
            ValueError: rows of another length or not finite, or n is unknown.
        """
        given = features.detach().cpu().numpy() if isinstance(features, Tensor) else features
        rows = np.array(given, np.float64)
        if rows.ndim != 2 or rows.shape[1] != self.dim:
            raise ValueError(f"expected features (B, {self.dim}), found {rows.shape}")
        if not np.isfinite(rows).all():
            raise ValueError("the features hold NaN or infinity; look at the images")
        self._known("add images to")
        while len(rows):
            take = _BLOCK - self._count_waiting
            self._waiting.append(rows[:take])
            self._count_waiting += len(rows[:take])
            rows = rows[take:]
            if self._count_waiting == _BLOCK:
                self._flush()

    def merge(self, other: GaussianStats) -> None:
        """Add the rows that another accumulator has seen.

        Raises:
            ValueError: the lengths of rows differ, or an n is unknown.
        """
        if other.dim != self.dim:
            raise ValueError(f"cannot merge features of {self.dim} and {other.dim} numbers")
        self._known("merge")
        theirs = other._known("merge")
        self._flush()
        other._flush()
        self._combine(other._mean, other._scatter, theirs)

    def _known(self, what: str) -> int:
        if (n := self.n) is None:
            raise ValueError(f"cannot {what} statistics of an unknown number of images")
        return n

    def _flush(self) -> None:
        """Fold the waiting rows in; further rows then start a new block."""
        if not self._count_waiting or self._n is None:
            return
        rows = np.concatenate(self._waiting)
        mean = rows.mean(0)
        rows -= mean
        self._combine(mean, rows.T @ rows, len(rows))
        self._waiting, self._count_waiting = [], 0

    def _combine(self, mean: Array, scatter: Array, n: int) -> None:
        """Add another sample's moments to those of the rows already folded in."""
        before = self._n or 0
        if n == 0:
            return
        delta = mean - self._mean
        self._scatter += scatter
        self._scatter += np.outer(delta * (before * n / (before + n)), delta)
        self._mean = self._mean + delta * (n / (before + n))
        self._n = before + n

    def save(self, file: str | Path | IO[bytes]) -> None:
        """Write `mu`, `sigma` (pytorch-fid's own file) and `n` as .npz.

        Args:
            file: a path ending in .npz, or a binary file open for writing.
        """
        n = {} if self.n is None else {"n": np.int64(self.n)}
        np.savez(file, mu=self.mean, sigma=self.cov, **n)  # type: ignore[arg-type]

    @classmethod
    def load(cls, file: str | Path | IO[bytes]) -> GaussianStats:
        """Read statistics that `save`, or pytorch-fid's `--save-stats`, wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file does not hold such statistics.
        """
        try:
            with np.load(file, allow_pickle=False) as archive:
                n = int(archive["n"]) if "n" in archive else None
                mean, cov = archive["mu"], archive["sigma"]
        except FileNotFoundError as error:
            raise FileNotFoundError(f"no statistics at {file}; check the path") from error
        except (KeyError, ValueError, EOFError, OSError, AttributeError, TypeError,
                zipfile.BadZipFile) as error:  # fmt: skip
            raise ValueError(
                f"{file} is not an .npz of statistics with `mu` and `sigma`"
            ) from error
        return cls.from_moments(mean, cov, n)
