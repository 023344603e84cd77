"""Seals: the sha256 of every file of a run or a store, in one file of its folder.

The seal is the file `SHA256SUMS`. A line is appended and flushed to the disk before the file of
that line gets its name, so a kill loses neither. A name has several lines if its file was written
several times. A process that is killed between line and rename leaves an earlier content, so every
content of a line counts as whole. The lines of shipped files are in
`pipeline/integrity/SHA256SUMS`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import UserError
from pipeline.integrity.digests import check_shipped, is_shipped, sha256_file
from pipeline.integrity.limits import LIST, read_regular

NAME = "SHA256SUMS"
#: the seals that this process has read, with their size, mtime and inode
_read: dict[Path, tuple[tuple[int, int, int], dict[str, list[str]]]] = {}
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def start(folder: Path) -> None:
    """Create the seal of a folder, unless it has one."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / NAME).touch()


def folder_of(path: Path) -> Path | None:
    """Return the nearest folder above a file that has a seal; None if there is none."""
    parents = Path(path).absolute().parents
    return next((folder for folder in parents if (folder / NAME).is_file()), None)


def record(path: Path, sha256: str) -> None:
    """Append a file to the seal above it, if there is one."""
    folder = folder_of(path)
    if folder is None or Path(path).name == NAME:
        return
    name = Path(path).absolute().relative_to(folder).as_posix()
    descriptor = os.open(folder / NAME, os.O_WRONLY | os.O_APPEND)
    try:
        # the first line break ends a line that a killed process left unfinished
        os.write(descriptor, f"\n{sha256}  {name}\n".encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def recorded(folder: Path) -> dict[str, list[str]]:
    """Return the sha256 of every content that a sealed folder's files had, by name."""
    path = Path(folder) / NAME
    state = path.stat()
    key = (state.st_size, state.st_mtime_ns, state.st_ino)
    known = _read.get(path)
    if known is None or known[0] != key:
        _read[path] = known = (key, parse(read_regular(path, LIST)))
    return known[1]


def parse(content: bytes) -> dict[str, list[str]]:
    """Return the sha256 that the content of a seal has of every file, by name."""
    sums: dict[str, list[str]] = {}
    for line in content.decode(errors="replace").splitlines():
        match = _LINE.fullmatch(line)
        if match is not None:
            sums.setdefault(match[2], []).append(match[1])
    return sums


def lines(sums: dict[str, str]) -> bytes:
    """Return the content of the seal of a folder whose files do not change again."""
    return "".join(f"{sha256}  {name}\n" for name, sha256 in sums.items()).encode()


def is_whole(path: Path, sha256: str | None = None) -> bool:
    """Return whether a file has a content that the seal above it holds.

    Args:
        path: of a file below a sealed folder.
        sha256: of its content; None hashes the file.
    """
    folder = folder_of(path)
    if folder is None:
        return False
    known = recorded(folder).get(Path(path).absolute().relative_to(folder).as_posix(), [])
    with contextlib.suppress(OSError):
        return (sha256 or sha256_file(path)) in known
    return False


def check(path: Path, data: bytes | None = None) -> None:
    """Check a file against its seal; one that lies below no seal is not checked.

    Args:
        path: of the file.
        data: its content, if it was read already.

    Raises:
        UserError: the file differs from its seal, or the seal does not have it.
    """
    folder = folder_of(path)
    if folder is None:
        if is_shipped(path):
            try:
                check_shipped(path)
            except ValueError as error:
                raise UserError(str(error)) from error
        return
    if not is_whole(path, None if data is None else hashlib.sha256(data).hexdigest()):
        raise UserError(
            f"{path} is damaged or foreign; expected a sha256 in {folder / NAME}; {advice(path)}"
        )


def advice(path: Path) -> str:
    """Return what to do about a damaged file, as the end of a message."""
    folder = folder_of(path) or Path(path).parent
    return f"see what is broken by `jkoflow verify {folder}`, and mend it by --repair"


def _links(folder: Path) -> Iterator[Path]:
    """Yield the symbolic links in a folder and its subfolders."""
    for place, subfolders, files in os.walk(folder):
        for name in (*subfolders, *files):
            if os.path.islink(os.path.join(place, name)):
                yield Path(place, name)


def require(folder: Path, what: str) -> None:
    """Check that a folder is sealed or shipped, and that no link leads out of it.

    Raises:
        UserError: it is not, or a link does.
    """
    for link in _links(Path(folder)):
        if not link.resolve().is_relative_to(Path(folder).resolve()):
            raise UserError(
                f"{link} in {what} {folder} is a link that leads out of it; expected files of its "
                "own; replace the link by what it points to"
            )
    inside = Path(folder) / "flow.json"
    if folder_of(inside) is None and not is_shipped(inside):
        raise UserError(
            f"{what} {folder} has no seal; expected {NAME} in it, as this version writes; seal "
            f"its files as they are by `jkoflow verify {folder} --seal`"
        )
