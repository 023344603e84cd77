"""Mean and covariance of features, accumulated in float64, and their files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pipeline.integrity.arrays import read_arrays
from pipeline.integrity.reason import reason_of

Array = npt.NDArray[np.float64]
Features = Tensor | npt.NDArray[np.floating]

_BLOCK = 1024


class GaussianStats:
    """Streaming sample mean and covariance of features f_1 … f_n in R^d.

        mean = Σ f_i / n,   cov = Σ (f_i - mean)(f_i - mean)ᵀ / (n - 1)

    These are the definitions of `numpy.cov` and pytorch-fid. Rows are collected into blocks of a
    fixed length. Each block is added by the update of the scatter matrices M of two samples:

        M_{ab} = M_a + M_b + δδᵀ · n_a n_b / (n_a + n_b),   δ = mean_b - mean_a

    Therefore the same rows in the same order give the same bits, however they were batched.
    Reading the mean or the covariance ends a block, and so changes the rounding of later rows.

    Reference: Chan, Golub, LeVeque 1983.
    """

    def __init__(self, dim: int = 2048) -> None:
        self.dim = dim
        self._n: int | None = 0
        self._mean: Array = np.zeros(dim)
        self._scatter: Array = np.zeros((dim, dim))
        self._waiting: list[Array] = []
        self._count_waiting = 0

    @classmethod
    def from_moments(cls, mean: npt.ArrayLike, cov: npt.ArrayLike, n: int | None) -> GaussianStats:
        """Build the statistics from mean (d,) and covariance (d, d) of n rows; n may be unknown.

        Raises:
            ValueError: the shapes do not fit, a value is not finite, or n < 2.
        """
        mean, cov = np.array(mean, np.float64), np.array(cov, np.float64)
        if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
            raise ValueError(
                f"mean and covariance have the shapes {mean.shape} and {cov.shape}; expected (d,) "
                "and (d, d)"
            )
        if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
            raise ValueError(
                "the statistics contain NaN or infinity; expected finite values; compute them "
                "again"
            )
        if n is not None and n < 2:
            raise ValueError(f"n is {n}; expected at least 2 images for a covariance")
        stats = cls(len(mean))
        stats._n, stats._mean, stats._scatter = n, mean, cov * (1 if n is None else n - 1)
        return stats

    @property
    def n(self) -> int | None:
        """Number of rows so far; None if a file did not state it."""
        return None if self._n is None else self._n + self._count_waiting

    @property
    def mean(self) -> Array:
        """Mean (d,), float64."""
        self._flush()
        return self._mean.copy()

    @property
    def cov(self) -> Array:
        """Covariance (d, d), float64, with divisor n - 1; ValueError for fewer than two rows."""
        self._flush()
        if self._n is None:
            return self._scatter.copy()
        if self._n < 2:
            raise ValueError(f"n is {self._n}; expected at least 2 images for a covariance")
        return self._scatter / (self._n - 1)

    def update(self, features: Features) -> None:
        """Add features (B, d), B ≥ 0.

        Raises:
            ValueError: the shape does not fit, a feature is not finite, or n is unknown.
        """
        if isinstance(features, Tensor):  # numpy has no bfloat16
            features = features.detach().cpu().double().numpy()
        rows = np.array(features, np.float64)
        if rows.ndim != 2 or rows.shape[1] != self.dim:
            raise ValueError(f"the features have the shape {rows.shape}; expected (B, {self.dim})")
        if not np.isfinite(rows).all():
            raise ValueError(
                "the features contain NaN or infinity; expected finite values; check the images"
            )
        if self._n is None:
            raise ValueError(
                "the statistics are of an unknown number of images; expected a known n to add rows"
            )
        while len(rows):
            take = _BLOCK - self._count_waiting
            self._waiting.append(rows[:take])
            self._count_waiting += len(rows[:take])
            rows = rows[take:]
            if self._count_waiting == _BLOCK:
                self._flush()

    def _flush(self) -> None:
        """Add the waiting rows as a block; further rows start a new one."""
        if not self._count_waiting or self._n is None:
            return
        rows = np.concatenate(self._waiting)
        mean = rows.mean(0)
        rows -= mean
        before, n = self._n, len(rows)
        delta = mean - self._mean
        self._scatter += rows.T @ rows
        self._scatter += np.outer(delta * (before * n / (before + n)), delta)
        self._mean = self._mean + delta * (n / (before + n))
        self._n = before + n
        self._waiting, self._count_waiting = [], 0

    @classmethod
    def load(cls, file: str | Path) -> GaussianStats:
        """Read `mu`, `sigma` and an optional `n` from an .npz of pytorch-fid's `--save-stats`.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file does not hold such statistics.
        """
        try:
            arrays = read_arrays(Path(file), ("n", "mu", "sigma"))
            n = int(arrays["n"]) if "n" in arrays else None
            return cls.from_moments(arrays["mu"], arrays["sigma"], n)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"no statistics at {file}; check the path") from error
        except (KeyError, ValueError, OSError, TypeError) as error:
            raise ValueError(
                f"{file} is not an .npz of statistics ({reason_of(error)}); expected the arrays "
                "`mu` and `sigma`"
            ) from error
