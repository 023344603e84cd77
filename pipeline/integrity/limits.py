"""The largest size that a file of unknown origin may take in memory or on the disk."""

from __future__ import annotations

import os
import stat
import zipfile
from pathlib import Path

#: environment variable that raises the limit
VARIABLE = "JKOFLOW_MAX_GIB"


class LimitError(ValueError):
    """A file that is larger than the limit, or a limit that is no number."""


#: parts of the limit that a file may have whose content takes many times its size in memory
CONFIGURATION, DOCUMENT, LIST = 2048, 32, 8


def limit() -> int:
    """Return the limit in bytes: `$JKOFLOW_MAX_GIB`, else 2 GiB."""
    text = os.environ.get(VARIABLE, "2")
    try:
        return int(float(text) * 2**30)
    except (ValueError, OverflowError) as error:
        raise LimitError(f"{VARIABLE} is {text!r}; expected a number of GiB") from error


def require_size(size: int, what: object, part: int = 1) -> None:
    """Check a size that a file claims, before anything is allocated.

    Args:
        size: bytes.
        what: the file, or its part.
        part: the file may have `1 / part` of the limit.

    Raises:
        LimitError: the size exceeds the limit, or is negative.
    """
    most = limit() // part
    if not 0 <= size <= most:
        raise LimitError(
            f"{what} claims {size} bytes; expected at most {most}; raise the limit by "
            f"{VARIABLE}, if you trust the file"
        )


def require_archive_size(archive: zipfile.ZipFile, what: object) -> None:
    """Check the unpacked size of a zip archive and the places of its members, as it claims them.

    Raises:
        ValueError: the members together exceed the limit, or one begins outside the file.
    """
    require_size(sum(entry.file_size for entry in archive.infolist()), what)
    for entry in archive.infolist():
        if not 0 <= entry.header_offset < archive.start_dir:
            raise ValueError(
                f"{what} is damaged: member {entry.filename} begins at byte {entry.header_offset}"
            )


def read_regular(path: Path, part: int) -> bytes:
    """Read a file of at most `1 / part` of the limit.

    Raises:
        OSError: the file cannot be read.
        LimitError: it is larger.
        ValueError: it is a device or a pipe, which may have no end.
    """
    state = path.stat()
    if not stat.S_ISREG(state.st_mode):
        raise ValueError(f"{path} is not a regular file")
    most = limit() // part
    if state.st_size > most:
        raise LimitError(
            f"{path} has {state.st_size} bytes; expected at most {most}; raise the limit by "
            f"{VARIABLE}, if you trust the file"
        )
    return path.read_bytes()
