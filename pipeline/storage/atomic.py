"""One commit protocol for every file that is later trusted.

A file is written under a unique temporary name in its own folder, flushed to the disk, and
only then renamed to its final name: whoever finds the final name finds the whole file. The
sha256 of what was written is returned, to be stored in a manifest and checked when read.
Folders (runs, caches) are whole when their manifest is: the manifest is committed last.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import platform
import re
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from pipeline.errors import JkoflowError, UserError

TEMPORARY_PREFIX = ".tmp-"
_OURS = re.compile(
    re.escape(TEMPORARY_PREFIX) + r".+-(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{8}"
)
_CHUNK = 1 << 20
_ABANDONED_SECONDS = 24 * 3600
_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:8]


class _HashingFile(io.RawIOBase):
    """A write-only binary stream that hashes what passes through it."""

    def __init__(self, inner: IO[bytes]) -> None:
        super().__init__()
        self.inner = inner
        self.hash = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:  # noqa: ANN401 - any object with the buffer protocol
        self.hash.update(data)
        return self.inner.write(data)


def write_with(path: Path, fill: Callable[[IO[bytes]], object]) -> str:
    """Commit a file whose content `fill` writes, front to back.

    Args:
        path: the final name; its folder is created when missing.
        fill: called once with a binary file open for (unseekable) writing.

    Returns:
        The sha256 of the content, in hex.

    Raises:
        JkoflowError: the disk refused (full, read-only); nothing is left under `path`.
    """
    path = Path(path)
    unique = f"{_HOST}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    temporary = path.parent / f"{TEMPORARY_PREFIX}{path.name}-{unique}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as raw:
            hashing = _HashingFile(raw)
            fill(hashing)  # type: ignore[arg-type]
            raw.flush()
            os.fsync(raw.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        raise JkoflowError(
            f"could not write {path} ({reason}); free some space or choose another place"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return hashing.hash.hexdigest()


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; file systems that cannot sync a folder are let be."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> str:
    """Commit `data` under `path`; returns its sha256 (see `write_with`)."""
    return write_with(path, lambda file: file.write(data))


def write_json(path: Path, value: object) -> str:
    """Commit `value` as readable JSON with a final newline; returns its sha256.

    Raises:
        ValueError: the value holds NaN or infinity, which JSON cannot say.
    """
    return write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> str:
    """Commit named tensors as one safetensors file; returns its sha256.

    Args:
        path: the final name.
        tensors: by name.
        metadata: one entry at most: safetensors writes several in random order, and the same
            content must give the same bytes.

    Raises:
        ValueError: more than one metadata entry.
    """
    if metadata and len(metadata) > 1:
        raise ValueError(f"one metadata entry at most, not {len(metadata)}; join them as JSON")
    clean = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    return write_bytes(path, save(clean, dict(metadata) if metadata else None))


def read_json(path: Path, what: str) -> Any:  # noqa: ANN401 - JSON is untyped
    """Read a JSON file, or say in one sentence why `what` cannot be read.

    Raises:
        UserError: the file is absent or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError as error:
        raise UserError(f"no {what} at {path}; check the path") from error
    except (ValueError, OSError) as error:
        raise UserError(
            f"{what} at {path} is not readable JSON ({error}); it is damaged, make it again"
        ) from error


def read_tensors(path: Path, sha256: str | None = None) -> dict[str, torch.Tensor]:
    """Read a safetensors file, checked against `sha256` when one is given.

    Raises:
        UserError: absent, damaged, or other than what was committed.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is missing; make it again or check the path")
    if sha256 is not None:
        verify_file(path, sha256)
    try:
        return load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise UserError(
            f"{path} is not a whole safetensors file ({error}); delete it and make it again"
        ) from error


def sha256_file(path: Path) -> str:
    """The sha256 of a file's content, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def verify_file(path: Path, sha256: str) -> None:
    """Check a file against the sha256 it was committed with.

    Raises:
        UserError: the file is missing, or its content differs.
    """
    if not Path(path).is_file():
        raise UserError(f"{path} is missing; make it again or check the path")
    found = sha256_file(path)
    if found != sha256:
        raise UserError(
            f"{path} is damaged (sha256 {found[:12]}…, expected {sha256[:12]}…); "
            "delete it and make it again"
        )


def sweep(folder: Path) -> int:
    """Remove temporaries that a killed process left in `folder`; returns how many.

    Only what has the form of this module's names is one.

    Temporaries of processes that still run are left alone, and so are those of other machines
    (a cluster's nodes share folders, not process numbers) until they are a day old.
    """
    removed = 0
    for stale in Path(folder).glob(f"{TEMPORARY_PREFIX}*"):
        with contextlib.suppress(OSError):
            if _abandoned(stale):
                stale.unlink()
                removed += 1
    return removed


def sweep_tree(folder: Path) -> int:
    """As :func:`sweep`, in a folder and all below it."""
    below = [path for path in Path(folder).rglob("*") if path.is_dir()]
    return sum(sweep(each) for each in (Path(folder), *below))


def _abandoned(temporary: Path) -> bool:
    """Whether this is a temporary of ours that nobody is writing any more."""
    ours = _OURS.fullmatch(temporary.name)
    if ours is None:
        return False
    if ours["host"] == _HOST:
        return not _alive(int(ours["pid"]))
    return time.time() - temporary.stat().st_mtime > _ABANDONED_SECONDS


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
