"""A table: rows in three splits, read in parts."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.integrity.arrays import read_array
from pipeline.integrity.reason import reason_of

SPLITS = ("train", "validation", "test")
#: where the archive of the MAF paper is, for messages
ARCHIVE = "the folder of https://zenodo.org/records/1161203"
Array = npt.NDArray[np.floating]


class Rows(Protocol):
    """Rows of one split."""

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def read(self, start: int, stop: int) -> Tensor:
        """Return the rows [start, stop), float32 (stop − start, D)."""
        ...


@dataclass(frozen=True)
class ArrayRows:
    """Rows in memory.

    Attributes:
        values: (n, D).
    """

    values: Array

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.values)

    def read(self, start: int, stop: int) -> Tensor:
        """Return the rows [start, stop), float32 (stop − start, D)."""
        return torch.from_numpy(np.ascontiguousarray(self.values[start:stop], np.float32))


@dataclass(frozen=True)
class Table:
    """A tabular data set, ready for a model.

    Attributes:
        name: one of `pipeline.config.data.TABLES`.
        dim: D.
        rows: rows of each split.
        source: where the rows come from.
        split: how the rows and the split compare with those of the literature.
        log_scale: Σ log of the factors that the rows are divided by beyond the literature's
            preprocessing, in nats. The NLL in the literature's units is that of the rows plus it.
    """

    name: str
    dim: int
    rows: Mapping[str, Rows]
    source: str
    split: str
    log_scale: float = 0.0

    @property
    def fingerprint(self) -> str:
        """Return a sha256 of the sizes of the splits and of some rows of each."""
        digest = hashlib.sha256(self.name.encode())
        for name in SPLITS:
            rows = self.rows[name]
            digest.update(f"{len(rows)}".encode())
            digest.update(rows.read(0, min(64, len(rows))).numpy().tobytes())
            digest.update(rows.read(len(rows) - 1, len(rows)).numpy().tobytes())
        return digest.hexdigest()


def split_rows(values: Array) -> dict[str, Array]:
    """Split rows (n, D) as the MAF paper does: the last tenth is the test split.

    The last tenth of the rest is the validation split, and what remains is the training split.

    Reference: Papamakarios, Pavlakou, Murray, "Masked autoregressive flow for density
    estimation" (NeurIPS 2017), and its code.
    """
    rest, test = np.split(values, [len(values) - int(0.1 * len(values))])
    train, validation = np.split(rest, [len(rest) - int(0.1 * len(rest))])
    return {"train": train, "validation": validation, "test": test}


def standardise(splits: Mapping[str, Array]) -> dict[str, Rows]:
    """Standardise splits (n, D) by mean and std of the training and validation rows together.

    Raises:
        UserError: a column is constant.
    """
    known = np.concatenate([splits["train"], splits["validation"]])
    require_variation(known)
    mean, std = known.mean(axis=0), known.std(axis=0)
    return {name: ArrayRows((rows - mean) / std) for name, rows in splits.items()}


def require_variation(rows: Array) -> None:
    """Check that every column of rows (n, D) varies, so that it can be divided by its deviation.

    Raises:
        UserError: one is constant.
    """
    constant = np.flatnonzero(np.ptp(rows, axis=0) == 0)
    if len(constant):
        raise UserError(
            f"column {int(constant[0])} of {rows.shape[1]} is constant in {len(rows):,} rows; "
            "expected varying columns, which have a density; give the whole file of this data set"
        )


def check_values(values: Array, columns: int, path: Path) -> Array:
    """Check rows that were read from a file.

    Args:
        values: the rows (n, D).
        columns: D.
        path: of the file, for messages.

    Returns:
        the rows (n, D), float64.

    Raises:
        UserError: the width is another, there are too few rows to split, or a value is NaN or
            infinite.
    """
    if values.ndim != 2 or values.shape[1] != columns:
        raise UserError(
            f"{path} holds an array of shape {values.shape}; expected (n, {columns}); give the "
            "file of this data set with data.path"
        )
    if len(values) < 100:
        raise UserError(
            f"{path} has {len(values)} rows; expected at least 100 for three splits; give the "
            "whole file"
        )
    bad = ~np.isfinite(values).all(axis=1)
    if bad.any():
        raise UserError(
            f"{path} has {int(bad.sum())} rows with NaN or infinity, the first of them row "
            f"{int(np.argmax(bad))}; expected finite numbers; remove these rows"
        )
    return values.astype(np.float64)


def read_npy(path: Path) -> Array:
    """Read a .npy file of numbers, of any shape; nothing is unpickled.

    Raises:
        UserError: the file is not readable, is truncated, or holds objects.
    """
    try:
        values = read_array(path)
    except ValueError as error:
        raise UserError(f"{error}; copy it again") from error
    if not np.issubdtype(values.dtype, np.number):
        raise UserError(f"{path} does not hold an array of numbers; give a .npy of floats")
    return values


def read_text(path: Path, delimiter: str | None, skip: int, columns: tuple[int, ...]) -> Array:
    """Read columns of a text file of numbers, float64 (n, len(columns)).

    Args:
        path: the file.
        delimiter: between two numbers; None is white space.
        skip: lines of its header.
        columns: their indices.

    Raises:
        UserError: a line is not of this form, for instance because the file is truncated.
    """
    try:
        return np.loadtxt(path, delimiter=delimiter, skiprows=skip, usecols=columns, ndmin=2)
    except (OSError, ValueError, IndexError) as error:
        reason = reason_of(error)
        raise UserError(
            f"{path} is not a readable table ({reason}); expected numbers in "
            f"{max(columns) + 1} columns; copy the file again"
        ) from error


def find_file(path: str | None, names: tuple[str, ...], what: str) -> Path:
    """Return the file of a data set: `data.path` itself, or the first of some names below it.

    Args:
        path: data.path.
        names: paths below the folder, in order of preference.
        what: the data set, for messages.

    Raises:
        UserError: the path is null or does not exist, or the folder has none of the names.
    """
    choices = " or ".join(names)
    if path is None:
        raise UserError(
            f"data.path is null; expected the file of {what} ({choices}) or its folder, because "
            f"no package has it; set data.path, for instance to {ARCHIVE}"
        )
    place = Path(path).expanduser()
    if place.is_file():
        return place
    for name in names:
        if (place / name).is_file():
            return place / name
    state = "has none of these" if place.is_dir() else "does not exist"
    raise UserError(f"data.path is {place}, which {state}: {choices}; set it to {what}")


def log_product(factors: Array) -> float:
    """Return Σ log of positive factors (D,), in nats."""
    return float(math.fsum(np.log(factors)))
