"""What a process uses of the machine."""

from __future__ import annotations

import ctypes
import shutil
import sys
from pathlib import Path

from pipeline.errors import UserError

try:
    import resource
except ImportError:  # Windows has no such module
    resource = None  # type: ignore[assignment]


def require_room(folder: Path, size: int, what: str) -> None:
    """Refuse to begin what the disk cannot hold.

    Args:
        folder: where it goes; it need not exist yet.
        size: bytes.
        what: what it is, for the message.

    Raises:
        UserError: fewer bytes are free.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if size > free:
        raise UserError(
            f"{what} need about {size / 1e9:.3g} GB, but {free / 1e9:.3g} GB are free at {place}; "
            "ask for fewer, or make room"
        )


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes; 0 where it is not known."""
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def keep_freed_memory() -> bool:
    """Have the C library keep memory that is freed, for the rest of this process.

    A training step frees all its activations. By default glibc may give them back to the system,
    as their order in the heap has it, and the next step pays for every page again: none to a fifth
    of the time of a small network.

    Returns:
        Whether the C library is glibc and took the setting; elsewhere nothing changes.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    # 32 MiB is the largest block that glibc lets lie in its heap
    settings = ((trim_threshold, 1 << 30), (mmap_threshold, 1 << 25))
    return all(library.mallopt(name, value) == 1 for name, value in settings)
