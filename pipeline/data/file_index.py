"""Index of content hashes of a user's files, so that each file is hashed once."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import JkoflowError, UserError
from pipeline.storage import atomic
from pipeline.storage.paths import data_root

FileRecord = dict[str, Any]


def file_records(
    folder: Path, names: Sequence[str], measure: Callable[[Path], FileRecord] | None = None
) -> list[FileRecord]:
    """Return `size`, `sha256` and the entries of `measure` for files, named relative to a folder.

    The index has the records of files with unchanged size and mtime. It is stored under the data
    root, since the folder may be read-only. Without it, the files are hashed again.

    Raises:
        UserError: a file cannot be read; the message names it.
    """
    key = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    path = data_root() / "file-index" / f"{key}.json"
    known = _read_index(path)
    records, changed = [], False
    for name in names:
        file = folder / name
        try:
            state = file.stat()
            entry = known.get(name, {})
            if entry.get("size") != state.st_size or entry.get("mtime_ns") != state.st_mtime_ns:
                entry = {"size": state.st_size, "sha256": atomic.sha256_file(file)}
                entry |= {"mtime_ns": state.st_mtime_ns} | (measure(file) if measure else {})
                known[name], changed = entry, True
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{file} could not be read ({reason}); check the file") from error
        records.append(entry)
    if changed:
        with contextlib.suppress(JkoflowError):
            atomic.write_json(path, known)
    return records


def _read_index(path: Path) -> dict[str, FileRecord]:
    """Read an index; one that is absent, damaged or of another form is empty."""
    with contextlib.suppress(UserError):
        known = atomic.read_json(path, "file index", part=1)
        if isinstance(known, dict) and all(isinstance(v, dict) for v in known.values()):
            return known
    return {}
