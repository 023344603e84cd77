"""Runs from elsewhere: `zoo:NAME` (shipped) or `hf://owner/name` in place of a run directory.

Package data may be read-only, so a shipped run is copied under the data root at its first use.
So is a run of the hub; it passes the checks of any run when it is opened.
"""

from __future__ import annotations

import re
from pathlib import Path

from pipeline.errors import UserError
from pipeline.integrity import hub
from pipeline.storage import atomic, seal
from pipeline.storage.paths import data_root
from pipeline.storage.shards.manifest import content_key

PREFIX = "zoo:"
_MANIFEST = "flow.json"
#: the files of a run in a repository of the hub
_FILES = ("blocks/*.safetensors", "autoencoder.safetensors", "config.yaml", "metrics.json",
          "CARD.md", "samples/grid.png", _MANIFEST, seal.NAME)  # fmt: skip
#: folders of copies: of shipped runs, and of runs of the hub
_ZOO, _HUB = "zoo", "hub"
#: name of a copy, with the start of its hash
_COPY = re.compile("(.+)-[0-9a-f]{12}")
_HUB_FILES = tuple(f"{helper}{name}" for helper in ("", "guide/", "refiner/") for name in _FILES)


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


def name_of(run: Path | str) -> str:
    """Return the name of a run in messages: zoo:NAME or hf://owner/name for a copy.

    It inverts `locate`; the folder of any other run is its name.
    """
    path, root = Path(run), data_root()
    for kind, start in ((_ZOO, PREFIX), (_HUB, "hf://")):
        if (root / kind) not in path.parents:
            continue
        copy, *inner = path.relative_to(root / kind).parts
        if match := _COPY.fullmatch(copy):
            name = match[1] if kind == _ZOO else match[1].replace("--", "/", 1)
            return "/".join([start + name, *inner])
    return str(run)


def locate(run: Path | str) -> Path:
    """Return the directory of a run; for zoo:NAME and hf://owner/name, that of its copy.

    zoo:NAME/guide and zoo:NAME/refiner are the runs inside a shipped one.

    Raises:
        UserError: no shipped run has this name, or a shipped file is damaged.
        ValueError: the hub has no such run, or cannot be reached.
        JkoflowError: the copy could not be written.
    """
    if hub.is_hub(run):
        return _copy_of_hub(run)
    if not is_shipped(run):
        return Path(run).expanduser()
    whole, _, inner = str(run).partition("/")
    if inner:
        return _inside(locate(whole), whole, inner)
    name, source = str(run).removeprefix(PREFIX), source_of(str(run))
    files = sorted(path for path in source.rglob("*") if path.is_file() and path.name != seal.NAME)
    records = [path for path in files if path.suffix in (".json", ".yaml", ".md")]
    parts = {str(path.relative_to(source)): atomic.sha256_file(path) for path in records}
    copy = data_root() / _ZOO / f"{name}-{content_key(parts)[:12]}"
    # the manifest is committed last, and marks a complete copy
    if not ((copy / _MANIFEST).is_file() and (copy / seal.NAME).is_file()):
        seal.start(copy)
        for path in sorted(files, key=lambda path: path == source / _MANIFEST):
            seal.check(path)
            atomic.write_bytes(copy / path.relative_to(source), path.read_bytes())
    return copy


def _inside(folder: Path, whole: str, inner: str) -> Path:
    """Return the directory of the guide or the refiner inside a shipped run."""
    parts = [name for name in ("guide", "refiner") if (folder / name / _MANIFEST).is_file()]
    if inner not in parts:
        raise UserError(
            f"{whole}/{inner} is no run; choose one of "
            f"{', '.join(f'{whole}/{name}' for name in parts) or whole}"
        )
    return folder / inner


def _copy_of_hub(run: Path | str) -> Path:
    """Return the copy of a run of the hub, made at its first use."""
    snapshot = hub.download(run, _HUB_FILES)
    repository = hub.split(run)[0].replace("/", "--")
    copy = data_root() / _HUB / f"{repository}-{snapshot.name[:12]}"
    files = sorted(path for path in snapshot.rglob("*") if path.is_file())
    if snapshot / _MANIFEST not in files or snapshot / seal.NAME not in files:
        raise UserError(
            f"{run} is no run of jkoflow: {_MANIFEST} or {seal.NAME} is missing; expected a "
            "repository of `jkoflow push`"
        )
    if not (copy / _MANIFEST).is_file():
        seal.start(copy)
        files.remove(snapshot / seal.NAME)
        for path in sorted(files, key=lambda path: path == snapshot / _MANIFEST):
            seal.check(path)
            atomic.write_bytes(copy / path.relative_to(snapshot), path.read_bytes())
    return copy
