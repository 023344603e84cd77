"""Whitening: the linear map that takes the training rows of a table to unit covariance."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.tabular.table import Rows, Table

#: first training rows whose covariance is taken, at most
_SAMPLE = 100_000
#: least variance of a direction, relative to the largest
_LEAST = 1e-10


@dataclass(frozen=True)
class Whitening:
    """The map x ↦ C^{−½} (x − m), with mean m and covariance C of the training rows.

    It is the optimal transport from N(m, C) to N(0, I).

    Attributes:
        mean: m, float64 (D,).
        matrix: C^{−½}, symmetric, float64 (D, D).
    """

    mean: Tensor
    matrix: Tensor

    @classmethod
    def fit(cls, rows: Tensor, name: str) -> Whitening:
        """Fit the map to rows (n, D).

        Args:
            rows: at least D + 1.
            name: of the table, for messages.

        Raises:
            UserError: the covariance has no inverse.
        """
        values = rows.double()
        covariance = torch.cov(values.T, correction=min(1, len(values) - 1))  # 0 of a single row
        variances, axes = torch.linalg.eigh(covariance.reshape(2 * values.shape[1:]))
        if float(variances[0]) <= _LEAST * float(variances[-1]):
            raise UserError(
                f"the covariance of {len(rows):,} rows of {name} has no inverse (variances "
                f"{float(variances[0]):.2g} to {float(variances[-1]):.2g}); expected independent "
                "columns; leave out --whiten, or give more rows"
            )
        return cls(values.mean(dim=0), axes * variances.rsqrt() @ axes.T)

    @property
    def log_scale(self) -> float:
        """Nats that the NLL of rows has beyond that of whitened rows, ½ log det C."""
        return -float(torch.linalg.slogdet(self.matrix).logabsdet)

    def apply(self, rows: Tensor) -> Tensor:
        """Return the whitened rows, float32 (n, D)."""
        return ((rows.double() - self.mean) @ self.matrix).float()

    def undo(self, rows: Tensor) -> Tensor:
        """Return the rows of whitened ones, float32 (n, D)."""
        return (torch.linalg.solve(self.matrix, rows.double().T).T + self.mean).float()


@dataclass(frozen=True)
class WhitenedRows:
    """Rows of one split, whitened when they are read.

    Attributes:
        rows: of the table.
        whitening: the map.
    """

    rows: Rows
    whitening: Whitening

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def read(self, start: int, stop: int) -> Tensor:
        """Return the rows [start, stop), float32 (stop − start, D)."""
        return self.whitening.apply(self.rows.read(start, stop))


def whiten(table: Table, limit: int | None = None) -> tuple[Table, Whitening]:
    """Whiten a table by its first training rows, 100,000 of them at most.

    Args:
        table: the table.
        limit: training rows that are used; None for all.

    Returns:
        the table of whitened rows, whose `log_scale` makes its NLL that of the data, and the map.

    Raises:
        UserError: the covariance of the rows has no inverse.
    """
    train = table.rows["train"]
    known = train.read(0, min(limit or len(train), len(train), _SAMPLE))
    whitening = Whitening.fit(known, table.name)
    rows = {split: WhitenedRows(part, whitening) for split, part in table.rows.items()}
    log_scale = table.log_scale + whitening.log_scale
    return dataclasses.replace(table, rows=rows, log_scale=log_scale), whitening
