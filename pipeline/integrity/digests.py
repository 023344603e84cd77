"""Hashes of files, remembered while a file does not change, and checks of single files.

A shipped file is checked against `SHA256SUMS`, which `sha256sum -c` reads as well. Any other
single file (autoencoder weights, reference statistics) carries the digest of its own bytes. The
digest is computed with zeros in its place.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from functools import cache
from pathlib import Path

#: the folder that holds the packages, to which the paths in the list are relative
HOME = Path(__file__).resolve().parents[2]
LIST = Path(__file__).with_name("SHA256SUMS")
#: the value of the metadata entry `seal`, before `stamp` fills in the digest
BLANK = "jkoflow-sha256:" + "0" * 64
_DIGEST = re.compile(rb"jkoflow-sha256:([0-9a-f]{64})")
_HEADER = 1 << 24
_CHUNK = 1 << 20
#: a file that was written within this time of its hashing may change without a new mtime
_UNSETTLED_NS = 2 * 10**9

_known: dict[str, tuple[tuple[int, ...], str]] = {}


def sha256_file(path: str | Path) -> str:
    """Return the sha256 of a file's content, in hex; an unchanged file is hashed once.

    The process remembers the hash with size, mtime, ctime and inode.
    """
    known = _known.get(str(path))
    if known is not None and known[0] == _state(os.stat(path)):
        return known[1]
    with open(path, "rb") as file:
        state = os.fstat(file.fileno())
        digest = hashlib.sha256()
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    if time.time_ns() - max(state.st_mtime_ns, state.st_ctime_ns) > _UNSETTLED_NS:
        _known[str(path)] = (_state(state), digest.hexdigest())
    return digest.hexdigest()


def _state(state: os.stat_result) -> tuple[int, ...]:
    """Return what changes when a file is written again."""
    return state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_dev, state.st_ino


def remembered(path: str | Path) -> list[int | str] | None:
    """Return what this process remembers of a file: its state and its sha256; None for nothing."""
    known = _known.get(str(path))
    return None if known is None else [*known[0], known[1]]


def remember(path: str | Path, known: list[int | str]) -> None:
    """Take over what an earlier process remembered of a file; another state has no effect."""
    *state, sha256 = known
    _known.setdefault(str(path), (tuple(int(value) for value in state), str(sha256)))


@cache
def shipped() -> dict[str, str]:
    """Return the sha256 of every shipped file by its path under `HOME`."""
    lines = (line.split("  ", 1) for line in LIST.read_text().splitlines())
    return {name: sha256 for sha256, name in lines}


def is_shipped(path: str | Path) -> bool:
    """Return whether the list of the shipped files has a file."""
    path = Path(path).resolve()
    return path.is_relative_to(HOME) and path.relative_to(HOME).as_posix() in shipped()


def check_shipped(path: str | Path) -> None:
    """Check a shipped file against the list.

    Raises:
        ValueError: the file is not in the list, or its content differs.
    """
    path = Path(path).resolve()
    name = path.relative_to(HOME).as_posix() if path.is_relative_to(HOME) else str(path)
    if shipped().get(name) != sha256_file(path):
        raise ValueError(
            f"the shipped file {path} is damaged; expected the sha256 of {LIST.name}; install "
            "jkoflow again"
        )


def stamp(data: bytes) -> bytes:
    """Fill the digest into the content of a safetensors file, where its metadata has `BLANK`."""
    place = data[:_HEADER].find(BLANK.encode())
    if place < 0:
        return data
    end = place + len(BLANK)
    return data[: end - 64] + hashlib.sha256(data).hexdigest().encode() + data[end:]


def check_file(path: str | Path) -> None:
    """Check a single file: a shipped one by the list, any other by the digest that it holds.

    A copy of a shipped file counts as shipped.

    Raises:
        OSError: the file cannot be read.
        ValueError: the content differs from its digest, or the file holds none.
    """
    path = Path(path).resolve()
    if is_shipped(path):
        check_shipped(path)
        return
    if sha256_file(path) in shipped().values():
        return
    with open(path, "rb") as file:
        head = file.read(_HEADER)
        found = _DIGEST.search(head)
        if found is None:
            raise ValueError(
                f"{path} holds no digest of its content; expected a file of this version; write "
                "it again"
            )
        digest = hashlib.sha256(head[: found.start(1)] + b"0" * 64 + head[found.end(1) :])
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != found[1].decode():
        raise ValueError(f"{path} is damaged; its content differs from its digest; write it again")
