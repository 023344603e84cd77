"""Readers of NumPy's files of unknown origin: .npy, and .npz archives of them."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from pipeline.integrity.limits import require_archive_size, require_size
from pipeline.integrity.reason import reason_of

Array = npt.NDArray[Any]


def read_array(path: Path) -> Array:
    """Read a .npy file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is damaged, holds objects, or exceeds the limit.
    """
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            return _read(file, size)
    except Exception as error:
        raise ValueError(
            f"{path} is not a whole .npy file of numbers ({reason_of(error)})"
        ) from error


def read_arrays(path: Path, names: Collection[str]) -> dict[str, Array]:
    """Read those arrays of an .npz that have one of some names.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is damaged, encrypted, holds objects, or exceeds the limit.
    """
    arrays: dict[str, Array] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            require_archive_size(archive, path)
            for entry in archive.infolist():
                name = entry.filename.removesuffix(".npy")
                if name in names:
                    data = archive.read(entry)
                    arrays[name] = _read(io.BytesIO(data), len(data))
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(
            f"{path} is not a whole .npz file of numbers ({reason_of(error)})"
        ) from error
    return arrays


def read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read shape, Fortran order and dtype from the start of a .npy file of format 1 or 2.

    Raises:
        ValueError: it has no such start.
    """
    format_ = np.lib.format
    try:
        old = format_.read_magic(file) == (1, 0)
        header = (format_.read_array_header_1_0 if old else format_.read_array_header_2_0)(file)
    except Exception as error:  # a header is parsed as Python, which raises errors of many kinds
        raise ValueError(f"it has no header of a .npy ({reason_of(error)})") from error
    if min(header[0], default=0) < 0:
        raise ValueError(f"its shape is {header[0]}")
    return header


def _read(file: IO[bytes], size: int) -> Array:
    """Read a .npy of a size in bytes, which its header may not exceed."""
    shape, _, dtype = read_header(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    claimed = math.prod(shape) * dtype.itemsize
    require_size(claimed, "its header")
    if claimed > size:
        raise ValueError(f"its header claims {claimed} bytes of {size}")
    file.seek(0)
    values: Array = np.lib.format.read_array(file, allow_pickle=False)
    return values
