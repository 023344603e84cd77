"""Disk space, memory and the memory allocator of this process."""

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


def require_disk_space(folder: Path, size: int, what: str) -> None:
    """Raise UserError if a disk has no room for `size` bytes of files, before they are made.

    `what` names the files in the message, a plural.
    """
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if size > free:
        raise UserError(
            f"{what} need about {size / 1e9:.3g} GB, but {free / 1e9:.3g} GB are free at "
            f"{existing}; ask for fewer, or make room"
        )


def peak_memory() -> int:
    """Return the peak resident memory of this process in bytes; 0 where it is unknown."""
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory for the rest of this process; return whether it does.

    A training step frees all its activations. By default glibc may return them to the system. Then
    the next step pays for every page again: up to a fifth of the time of a small network.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    # 32 MiB is the largest block that glibc keeps in its heap
    settings = ((trim_threshold, 1 << 30), (mmap_threshold, 1 << 25))
    return all(library.mallopt(name, value) == 1 for name, value in settings)
