"""Disk space, memory and the memory allocator of this process."""

from __future__ import annotations

import ctypes
import os
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
    while not os.path.exists(existing):  # the method raises for a name that is too long
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if size > free:
        raise UserError(
            f"{what} need about {size / 1e9:.3g} GB, but {free / 1e9:.3g} GB are free at "
            f"{existing}; ask for fewer, or make room"
        )


def require_memory(size: int, what: str, remedy: str) -> None:
    """Raise UserError if `size` bytes exceed the memory of the machine, before they are allocated.

    Args:
        size: bytes that are needed at least.
        what: needs them, a singular.
        remedy: what to change, the end of the message.
    """
    memory = machine_memory()
    if memory and size > memory:
        raise UserError(
            f"{what} needs at least {_bytes(size)} of memory; expected at most {_bytes(memory)}, "
            f"as this machine has; {remedy}"
        )


def machine_memory() -> int:
    """Return the memory of the machine and of its GPUs, in bytes; 0 where it is unknown."""
    import torch

    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows
        return 0
    for index in range(torch.cuda.device_count()):
        memory += torch.cuda.get_device_properties(index).total_memory
    return memory


def _bytes(size: int) -> str:
    """Format a size, such as 9 TB."""
    for factor, unit in ((10**15, "PB"), (10**12, "TB")):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size / 1e9:.3g} GB"


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
