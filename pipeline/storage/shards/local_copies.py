"""Local copies of shards: their folder, the bound of all together, and room for another."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import UserError
from pipeline.storage import atomic
from pipeline.storage.paths import data_root, unwritable

#: environment variable with the folder of the copies, which may lie on a disk of one machine
FOLDER = "JKOFLOW_CACHE"
#: environment variable with the bound of all copies together
BOUND = "JKOFLOW_CACHE_GIB"


def bound() -> int:
    """Return the bytes of all copies together: `$JKOFLOW_CACHE_GIB`, else 50 GiB.

    Raises:
        UserError: the variable is not a positive number.
    """
    text = os.environ.get(BOUND, "50")
    try:
        size = int(float(text) * 2**30)
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise UserError(f"{BOUND} is {text!r}; expected a positive number of GiB")
    return size


def copies_folder() -> Path:
    """Return the folder of all copies: `$JKOFLOW_CACHE`, else one below the data root."""
    folder = os.environ.get(FOLDER)
    return Path(folder).expanduser().absolute() if folder else data_root() / "remote"


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Let one process at a time change the copies, where the system can lock files."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115 - closed below
    except OSError as error:
        raise unwritable(folder, error, "written") from error
    with lock:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)  # ends when the file is closed
        yield


def make_room(folder: Path, size: int, wanted: set[Path]) -> None:
    """Remove the oldest copies until `size` bytes fit, those of `wanted` last."""
    found = []
    for path in folder.glob("*/*"):
        with contextlib.suppress(OSError):
            state = path.stat()
            kept = path in wanted, not path.name.startswith(atomic.TEMPORARY_PREFIX)
            found.append((kept, state.st_mtime_ns, state.st_size, path))
    total = sum(row[2] for row in found)
    for _, _, own, path in sorted(found):
        if total + size <= bound():
            return
        path.unlink(missing_ok=True)
        total -= own
