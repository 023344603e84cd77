"""Shipped runs: `zoo:NAME` in place of a run directory.

Package data may be read-only, so a shipped run is copied under the data root at its first use.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import UserError
from pipeline.storage import atomic, seal
from pipeline.storage.paths import data_root
from pipeline.storage.shards import content_key

PREFIX = "zoo:"
_MANIFEST = "flow.json"


def zoo() -> dict[str, Path]:
    """Return the folders of the shipped runs by name."""
    root = Path(__file__).parents[1] / "zoo"
    return {path.parent.name: path.parent for path in sorted(root.glob(f"*/{_MANIFEST}"))}


def is_shipped(run: Path | str) -> bool:
    """Return whether a run is given as `zoo:NAME`."""
    return str(run).startswith(PREFIX)


def source_of(run: str) -> Path:
    """Return the folder in the package of a run that is given as `zoo:NAME`.

    Raises:
        UserError: no shipped run has this name.
    """
    name, known = run.removeprefix(PREFIX), zoo()
    if name not in known:
        raise UserError(
            f"unknown shipped run {run!r}; choose one of {', '.join(known) or '(none)'}, or give "
            "the path of a run directory"
        )
    return known[name]


def locate(run: Path | str) -> Path:
    """Return the directory of a run; for zoo:NAME, that of its copy.

    Raises:
        UserError: no shipped run has this name, or a shipped file is damaged.
        JkoflowError: the copy could not be written.
    """
    if not is_shipped(run):
        return Path(run).expanduser()
    name, source = str(run).removeprefix(PREFIX), source_of(str(run))
    files = sorted(path for path in source.rglob("*") if path.is_file() and path.name != seal.NAME)
    records = [path for path in files if path.name in (_MANIFEST, "config.yaml")]
    parts = {str(path.relative_to(source)): atomic.sha256_file(path) for path in records}
    copy = data_root() / "zoo" / f"{name}-{content_key(parts)[:12]}"
    # the manifest is committed last, and marks a complete copy
    if not ((copy / _MANIFEST).is_file() and (copy / seal.NAME).is_file()):
        seal.start(copy)
        for path in sorted(files, key=lambda path: path == source / _MANIFEST):
            seal.check(path)
            atomic.write_bytes(copy / path.relative_to(source), path.read_bytes())
    return copy
