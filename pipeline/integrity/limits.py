"""The largest size that a file of unknown origin may take in memory or on the disk."""

from __future__ import annotations

import os
import zipfile

#: environment variable that raises the limit
VARIABLE = "JKOFLOW_MAX_GIB"


def limit() -> int:
    """Return the limit in bytes: `$JKOFLOW_MAX_GIB`, else 2 GiB."""
    text = os.environ.get(VARIABLE, "2")
    try:
        return int(float(text) * 2**30)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{VARIABLE} is {text!r}; expected a number of GiB") from error


def require_size(size: int, what: object) -> None:
    """Check a size that a file claims, before anything is allocated.

    Args:
        size: bytes.
        what: the file, or its part.

    Raises:
        ValueError: the size exceeds the limit, or is negative.
    """
    most = limit()
    if not 0 <= size <= most:
        raise ValueError(
            f"{what} claims {size} bytes; expected at most {most}; raise the limit by "
            f"{VARIABLE}, if you trust the file"
        )


def require_archive_size(archive: zipfile.ZipFile, what: object) -> None:
    """Check the unpacked size of a zip archive, as its directory claims it.

    Raises:
        ValueError: the members together exceed the limit.
    """
    require_size(sum(entry.file_size for entry in archive.infolist()), what)
