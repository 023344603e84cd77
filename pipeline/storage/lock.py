"""Locks of folders: one process writes a run, a cache or an output at a time.

The lock of `runs/a` is the file `runs/.a.lock`. A hard link creates it, which is atomic on network
file systems too, where file locks may do nothing. It names its owner by host, process and start,
and the owner touches it every few seconds. A lock is stale if its owner has ended. A lock of
another host or container is stale if it was not touched for minutes. A stale lock is taken over.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import JkoflowError
from pipeline.storage.paths import unwritable

_TOUCH_SECONDS = 5.0
_STALE_SECONDS = 300.0
_POLL_SECONDS = 0.2

#: locks of this process, with the number of their users
_held: dict[Path, int] = {}


def lock_file(folder: Path) -> Path:
    """Return the lock of a folder, which lies next to it."""
    folder = Path(folder).absolute()
    return folder.parent / f".{folder.name}.lock"


@contextlib.contextmanager
def locked(
    folder: Path, what: str, wait: Callable[[str], object] | None = None
) -> Iterator[None]:
    """Hold the lock of a folder; a process may hold it several times.

    Args:
        folder: is about to be written; it need not exist.
        what: name of the folder in messages.
        wait: receives a message, and then another process is waited for; None is an error.

    Raises:
        JkoflowError: another process writes the folder, or its place is not writable.
    """
    path = lock_file(folder)
    if path not in _held:
        try:
            _acquire(path, f"{what} {folder}", wait)
        except OSError as error:
            raise unwritable(folder, error, "locked") from error
        _held[path] = 0  # before the thread looks
        threading.Thread(target=_touch, args=(path,), daemon=True).start()
    _held[path] += 1
    try:
        yield
    finally:
        _held[path] -= 1
        if not _held[path]:
            del _held[path]
            path.unlink(missing_ok=True)


def release_all() -> None:
    """Remove the locks of this process, before a signal ends it."""
    for path in tuple(_held):
        with contextlib.suppress(OSError):
            path.unlink()


def _acquire(path: Path, what: str, wait: Callable[[str], object] | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    own = path.with_name(f"{path.name}-{uuid.uuid4().hex[:8]}")
    own.write_text(json.dumps(_owner(os.getpid())))
    waiting = False
    try:
        while not _link(own, path):
            owner = _read(path)
            if owner is None:
                continue  # it was released a moment ago
            os.utime(own)
            age = own.stat().st_mtime - owner["touched"]  # by the clock of the file system
            if _is_stale(owner, age):
                _remove(path, owner)
            elif wait is None:
                raise JkoflowError(f"{_used(what, owner)}; wait for its end, or choose another")
            else:
                if not waiting:
                    wait(f"{_used(what, owner)}; waiting for its end")
                waiting = True
                time.sleep(_POLL_SECONDS)
    finally:
        own.unlink(missing_ok=True)


def _used(what: str, owner: dict[str, Any]) -> str:
    """Say who uses a folder, and for how long."""
    seconds = time.time() - float(owner.get("since", owner["touched"]))
    known = "pid" in owner  # the lock of another user cannot be read
    process = f"process {owner['pid']} on {owner.get('host')}" if known else "another process"
    return f"{what} is in use by {process} for {seconds:.0f} s"


def _link(own: Path, path: Path) -> bool:
    """Create the lock; return whether it is ours."""
    try:
        os.link(own, path)
    except FileExistsError:
        return False
    except (PermissionError, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        try:  # a file system without hard links
            with open(path, "x") as file:
                file.write(own.read_text())
        except FileExistsError:
            return False
    return True


def _owner(pid: int) -> dict[str, Any]:
    """Describe a process of this host."""
    own = {"host": platform.node(), "space": number_space(), "pid": pid, "start": _start(pid)}
    return {**own, "since": time.time()}


def number_space() -> str:
    """Return what tells apart containers of one host name, which number their processes alone."""
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def has_ended(pid: int) -> bool:
    """Return whether a process of this host has ended, also if its parent has not noticed yet."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return _stat(pid)[:1] in (["Z"], ["X"])


def _stat(pid: int) -> list[str]:
    """Return the fields of a process from its state on; none where the system does not say."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return []


def _start(pid: int) -> str | None:
    """Return when a process started, so that a number that is used again is noticed."""
    fields = _stat(pid)
    return fields[19] if len(fields) > 19 else None


def _read(path: Path) -> dict[str, Any] | None:
    """Read the owner of a lock with the time of its last touch; None if it is gone."""
    try:
        touched = path.lstat().st_mtime
    except FileNotFoundError:
        return None
    try:
        owner = dict(json.loads(path.read_text()))
    except FileNotFoundError:
        if not path.is_symlink():
            return None
        owner = {}
    except (OSError, ValueError, TypeError):  # as of a lock that only its owner may read
        owner = {}
    return {**owner, "touched": touched}


def _is_stale(owner: dict[str, Any], age: float) -> bool:
    """Return whether the owner of a lock has ended."""
    here = (owner.get("host"), owner.get("space")) == (platform.node(), number_space())
    if not here or not isinstance(owner.get("pid"), int):
        return age > _STALE_SECONDS
    pid = int(owner["pid"])
    return has_ended(pid) or _start(pid) != owner.get("start")


def _remove(path: Path, stale: dict[str, Any]) -> None:
    """Remove a stale lock, unless another process has taken it over."""
    aside = path.with_name(f"{path.name}-{uuid.uuid4().hex[:8]}")
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, aside)
        found = _read(aside)
        if found is not None and {**found, "touched": 0} != {**stale, "touched": 0}:
            with contextlib.suppress(FileExistsError):
                os.link(aside, path)
        aside.unlink(missing_ok=True)


def _touch(path: Path) -> None:
    """Touch a lock as long as this process holds it."""
    while path in _held:
        with contextlib.suppress(OSError):
            os.utime(path)
        time.sleep(_TOUCH_SECONDS)
