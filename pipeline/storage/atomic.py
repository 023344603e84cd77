"""Atomic writes of files, and reads that verify their sha256.

A file is written under a unique temporary name, flushed to the disk and then renamed, so a file
under its final name is complete. Files below a sealed folder are recorded in its seal and checked
against it (`pipeline.storage.seal`). A folder (run, cache) is complete when its manifest exists,
which is written last.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import platform
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from pipeline.errors import UserError
from pipeline.integrity.digests import sha256_file, stamp
from pipeline.integrity.limits import DOCUMENT, LimitError, read_regular
from pipeline.integrity.reason import reason_of
from pipeline.storage import seal
from pipeline.storage.lock import has_ended, number_space
from pipeline.storage.paths import require_place, unwritable

TEMPORARY_PREFIX = ".tmp-"
_TEMPORARY_NAME = re.compile(
    re.escape(TEMPORARY_PREFIX) + r".+-(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{8}"
)
_ABANDONED_SECONDS = 24 * 3600
#: temporary files and folders that this process writes at the moment
_open_temporaries: set[Path] = set()
#: folders from which this process has removed what killed processes left
_swept: set[Path] = set()
_HOST = hashlib.sha256(f"{platform.node()} {number_space()}".encode()).hexdigest()[:8]


class _HashingFile(io.RawIOBase):
    """Write-only binary stream that hashes its content."""

    def __init__(self, inner: IO[bytes]) -> None:
        super().__init__()
        self.inner = inner
        self.hash = hashlib.sha256()

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, data: Any) -> int:  # noqa: ANN401 - any object with the buffer protocol
        """Write and hash bytes; return their number."""
        self.hash.update(data)
        return self.inner.write(data)


def write_with(
    path: Path, fill: Callable[[IO[bytes]], object], sealed: bool = True
) -> str:
    """Write a file atomically with the content that `fill` writes; return its sha256 in hex.

    The folder is created if it is missing. `fill` is called once with a file that cannot seek. The
    seal above the file records it, unless `sealed` is False, as for a file that grows.

    Raises:
        UserError: a folder, a device or a pipe has this name, or no file can have it.
        JkoflowError: the disk is full or read-only; no file is left under `path`.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        require_place(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.parent.absolute() not in _swept:
            _swept.add(path.parent.absolute())
            remove_temporaries(path.parent)
        _open_temporaries.add(temporary)
        with open(temporary, "wb") as raw:
            hashing = _HashingFile(raw)
            fill(hashing)  # type: ignore[arg-type]
            raw.flush()
            os.fsync(raw.fileno())
        if sealed:
            seal.record(path, hashing.hash.hexdigest())
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        raise unwritable(path, error, "written") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        _open_temporaries.discard(temporary)
    return hashing.hash.hexdigest()


def _temporary(path: Path) -> Path:
    """Return a name that no other process uses, next to a path."""
    unique = f"{_HOST}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    return path.parent / f"{TEMPORARY_PREFIX}{path.name}-{unique}"


@contextlib.contextmanager
def scratch_folder(parent: Path | None = None) -> Iterator[Path]:
    """Create an empty folder for this block; the end, an error or a signal removes it.

    A later call in the same place removes the folders of killed processes. The place is that of
    the system's temporary files, unless `parent` is given.

    Raises:
        JkoflowError: the folder cannot be created.
    """
    parent = Path(tempfile.gettempdir() if parent is None else parent)
    folder = _temporary(parent / "jkoflow")
    remove_temporaries(parent)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700)
    except OSError as error:
        raise unwritable(folder, error, "created") from error
    _open_temporaries.add(folder)
    try:
        yield folder
    finally:
        _discard(folder)
        _open_temporaries.discard(folder)


def discard_at_signal(folder: Path) -> None:
    """Remove a folder with its content when a signal ends this process."""
    _open_temporaries.add(folder)


def _discard(temporary: Path) -> None:
    """Remove a temporary file, or a temporary folder with its content, as far as possible."""
    if temporary.is_dir() and not temporary.is_symlink():
        shutil.rmtree(temporary, ignore_errors=True)
    else:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_bytes(path: Path, data: bytes, sealed: bool = True) -> str:
    """Write bytes atomically and return their sha256 (see `write_with`)."""
    return write_with(path, lambda file: file.write(data), sealed)


def write_json(path: Path, value: object) -> str:
    """Write a value atomically as indented JSON and return the sha256 of the file.

    JSON has no NaN and no infinity: they are a ValueError.
    """
    return write_bytes(path, json_bytes(value))


def json_bytes(value: object) -> bytes:
    """Encode a value as `write_json` does.

    Raises:
        ValueError: the value holds NaN or infinity.
    """
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> str:
    """Write tensors (…) atomically as one safetensors file and return its sha256.

    Metadata of several entries are a ValueError, because safetensors writes them in random order.
    The digest of the file is filled into them where they have `pipeline.integrity.digests.BLANK`.
    """
    if metadata and len(metadata) > 1:
        raise ValueError(f"metadata has {len(metadata)} entries; expected at most 1; join them")
    clean = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    return write_bytes(path, stamp(save(clean, dict(metadata) if metadata else None)))


def read_json(path: Path, what: str, part: int = DOCUMENT) -> Any:  # noqa: ANN401 - JSON
    """Read a JSON file of at most `1 / part` of the limit; `what` is its name in an error.

    Raises:
        UserError: the file is absent, too large, not JSON, or differs from the seal above it.
    """
    try:
        data = read_regular(Path(path), part)
        seal.check(path, data)
        return json.loads(data)
    except FileNotFoundError as error:
        raise UserError(f"{what} {path} does not exist; check the path") from error
    except UserError:  # of the seal
        raise
    except LimitError as error:
        raise UserError(f"{what} {error}") from error
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(
            f"{what} {path} is not readable JSON ({reason_of(error)}); it is damaged; make it "
            "again"
        ) from error


def read_tensors(path: Path, sha256: str | None = None) -> dict[str, torch.Tensor]:
    """Read a safetensors file and verify its `sha256`; None is one of the seal above the file.

    Raises:
        UserError: the file is absent or damaged, or its hash differs.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is missing; make it again or check the path")
    if sha256 is not None:
        verify_file(path, sha256)
    else:
        seal.check(path)
    try:
        return load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise UserError(
            f"{path} is not a complete safetensors file ({reason_of(error)}); {seal.advice(path)}"
        ) from error


def verify_file(path: Path, sha256: str) -> None:
    """Verify the sha256 of a file.

    Raises:
        UserError: the file is missing, or its content differs.
    """
    if not Path(path).is_file():
        raise UserError(f"{path} is missing; make it again or check the path")
    actual = sha256_file(path)
    if actual != sha256:
        raise UserError(
            f"{path} is damaged (sha256 {actual[:12]}…, expected {sha256[:12]}…); "
            f"{seal.advice(path)}"
        )


def remove_temporaries(folder: Path) -> int:
    """Remove temporary files and folders of killed processes in a folder; return their number.

    Those of running processes are kept, and those of other machines until they are a day old. The
    nodes of a cluster share folders but not process numbers.
    """
    removed = 0
    for stale in Path(folder).glob(f"{TEMPORARY_PREFIX}*"):
        with contextlib.suppress(OSError):
            if _abandoned(stale):
                _discard(stale)
                removed += 1
    return removed


def remove_temporaries_below(folder: Path) -> int:
    """Remove the temporary files of killed processes in a folder and its subfolders."""
    below = [path for path in Path(folder).rglob("*") if path.is_dir()]
    return sum(remove_temporaries(path) for path in (Path(folder), *below))


def discard_temporaries() -> None:
    """Remove the files and folders that this process has begun, before a signal ends it."""
    for temporary in tuple(_open_temporaries):
        with contextlib.suppress(OSError):
            _discard(temporary)


def _abandoned(temporary: Path) -> bool:
    """Return whether this is a temporary file whose writer has ended."""
    match = _TEMPORARY_NAME.fullmatch(temporary.name)
    if match is None:
        return False
    if match["host"] == _HOST:
        return has_ended(int(match["pid"]))
    return time.time() - temporary.stat().st_mtime > _ABANDONED_SECONDS
