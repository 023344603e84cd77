"""Content hashes of a user's files, kept so that a large folder is read for them only once."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import JkoflowError, UserError
from pipeline.storage import atomic
from pipeline.storage.paths import data_root

Facts = dict[str, Any]


def file_facts(
    folder: Path, names: Sequence[str], more: Callable[[Path], Facts] | None = None
) -> list[Facts]:
    """Size and sha256 of files, from the index where size and time of change still agree.

    The index lies in the data root, since the folder may be read-only; losing it costs time
    and nothing else.

    Args:
        folder: where the files lie.
        names: their paths relative to it, with forward slashes.
        more: what else to learn of a file, JSON values only.

    Returns:
        For every file a dictionary with `size`, `sha256` and what `more` says.

    Raises:
        UserError: a file cannot be read; the sentence names it.
    """
    key = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    path = data_root() / "file-index" / f"{key}.json"
    known = _load(path)
    facts, changed = [], False
    for name in names:
        file = folder / name
        try:
            state = file.stat()
            entry = known.get(name, {})
            if entry.get("size") != state.st_size or entry.get("mtime_ns") != state.st_mtime_ns:
                entry = {"size": state.st_size, "sha256": atomic.sha256_file(file)}
                entry |= {"mtime_ns": state.st_mtime_ns} | (more(file) if more else {})
                known[name], changed = entry, True
        except OSError as error:
            raise UserError(f"could not read {file} ({error.strerror or error})") from error
        facts.append(entry)
    if changed:
        with contextlib.suppress(JkoflowError):
            atomic.write_json(path, known)
    return facts


def _load(path: Path) -> dict[str, Facts]:
    """The index; an absent, damaged or foreign one is empty."""
    with contextlib.suppress(UserError):
        known = atomic.read_json(path, "file index")
        if isinstance(known, dict) and all(isinstance(v, dict) for v in known.values()):
            return known
    return {}
