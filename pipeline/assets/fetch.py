"""The three assets that jkoflow fetches: MNIST, CIFAR-10 and the Inception weights of FID.

An asset has a list of sources, tried in order, and one sha256 of its content that every
source must meet. It is stored under `<data root>/assets/<name>/` beside a manifest with the
sha256 of each file, which is checked whenever the asset is asked for. One process at a time
fetches; the others wait for it and find the asset there.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.assets.catalogue import ASSETS, Asset
from pipeline.assets.download import DamagedError, SourceError
from pipeline.assets.mirrors import LocalSource, Source
from pipeline.assets.readers import Content
from pipeline.errors import JkoflowError, UserError
from pipeline.storage import atomic
from pipeline.storage.paths import data_root

try:
    import fcntl
except ImportError:  # Windows: files are still renamed into place whole, only fetched twice
    fcntl = None  # type: ignore[assignment]

FORMAT = 1
_MANIFEST = "manifest.json"

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}

_verified: dict[Path, tuple[object, ...]] = {}

Log = Callable[[str], object]


def fetch(
    name: str, *, root: Path | None = None, local: Path | None = None, log: Log = print
) -> Path:
    """Have an asset on this machine, verified.

    Args:
        name: "mnist", "cifar10" or "inception".
        root: the data root (default `data_root()`).
        local: a file, archive or folder that holds the raw files, tried before all else.
        log: told in sentences what happens; nothing when the asset is already there.

    Returns:
        The folder of the stored files; for "inception" the safetensors file.

    Raises:
        UserError: unknown asset, or `local` does not exist or is not the asset.
        JkoflowError: every source failed, or the disk refused.
    """
    if name not in ASSETS:
        raise UserError(f"unknown asset {name!r}; choose one of {', '.join(ASSETS)}")
    return fetch_asset(ASSETS[name], root or data_root(), local=local, log=log)


def fetch_asset(asset: Asset, root: Path, *, local: Path | None = None, log: Log = print) -> Path:
    """`fetch` for an asset that need not be in the table."""
    if local is not None and not local.exists():
        raise UserError(f"no {local} to read {asset.title} from; check the path")
    folder = root / "assets" / asset.name
    result = folder / asset.result if asset.result else folder
    if _is_stored(asset, folder, log):
        return result
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _only_one(folder / ".lock", asset, log):
            # Whoever held the lock before may have fetched it.
            if not _is_stored(asset, folder, _silent):
                _fetch_from_sources(asset, folder, local, log)
    except OSError as error:
        raise JkoflowError(
            f"could not store {asset.title} in {folder} ({error.strerror or error}); free some "
            "space, or set JKOFLOW_HOME to another place"
        ) from error
    return result


def _silent(_: str) -> None:
    """A log that tells nobody."""


def content_sha256(name: str) -> str:
    """The sha256 that an asset's content has, whatever source it came from."""
    return ASSETS[name].sha256


def _is_stored(asset: Asset, folder: Path, log: Log) -> bool:
    """Whether the stored files are whole and those of this asset; says why not."""
    manifest_path = folder / _MANIFEST
    if not manifest_path.exists():
        return False
    try:
        manifest = atomic.read_json(manifest_path, "manifest")
        if not isinstance(manifest, dict) or manifest.get("sha256") != asset.sha256:
            raise UserError(f"{manifest_path} belongs to another edition of {asset.title}")
        for name in asset.stored:
            _verify(folder / name, str(manifest["files"][name]))
    except (UserError, KeyError, TypeError) as error:
        log(f"{asset.title}: what is stored cannot be used, fetching it again ({error})")
        return False
    return True


def _verify(path: Path, sha256: str) -> None:
    """`commit.verify_file`, once in a process for a file that does not change."""
    state = path.stat() if path.is_file() else None
    stamp = state and (state.st_size, state.st_mtime_ns, state.st_ino, sha256)
    if stamp is None or _verified.get(path) != stamp:
        atomic.verify_file(path, sha256)
        if stamp is not None:
            _verified[path] = stamp


@contextlib.contextmanager
def _only_one(lock: Path, asset: Asset, log: Log) -> Iterator[None]:
    """Hold a lock that the system takes back when the process dies."""
    with open(lock, "a") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log(f"{asset.title}: waiting for another process that is fetching it")
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:
                pass  # a file system without locks: fetched twice at worst
        yield


def _fetch_from_sources(asset: Asset, folder: Path, local: Path | None, log: Log) -> None:
    """Try every source; returns once one of them has given the asset and it is stored."""
    by_hand = folder / "by-hand"
    sources: list[Source] = [LocalSource(by_hand), *asset.sources]
    if local is not None:
        sources = [LocalSource(local)]
    for stale in folder.glob(".scratch-*"):
        shutil.rmtree(stale, ignore_errors=True)
    atomic.sweep(folder)
    reasons = []
    for source in sources:
        # Without the folder there is nothing to say until everything has failed.
        tell = log if source is not sources[0] or local or by_hand.exists() else _silent
        tell(f"{asset.title}: trying {source.label}")
        try:
            content = _read_source(asset, source, folder)
        except SourceError as error:
            reasons.append(f"{source.label} ({error})")
            tell(f"{asset.title}: not from {source.label}: {error}")
            continue
        _store(asset, content, folder, source.label)
        log(f"{asset.title}: fetched from {source.label}, stored in {folder}")
        return
    if local is not None:
        raise UserError(f"{local} is not {asset.title}: {reasons[0]}; check the path")
    raise JkoflowError(
        f"could not get {asset.title} from any source: {'; '.join(reasons)}; put "
        f"{asset.by_hand} into {by_hand} and try again"
    )


def _read_source(asset: Asset, source: Source, folder: Path) -> Content:
    """Obtain and read one source, and check that its content is the asset's.

    Raises:
        SourceError: it did not deliver, or delivered something else.
        OSError: the disk is full or read-only, so that no source can help.
    """
    partial = folder / ".partial" / hashlib.sha256(source.label.encode()).hexdigest()[:12]
    resumed = partial.exists()
    while True:
        with tempfile.TemporaryDirectory(prefix=".scratch-", dir=folder) as name:
            try:
                raw = source.obtain(partial, Path(name))
                content = asset.read(raw, Path(name))
                if content.sha256 != asset.sha256:
                    raise DamagedError(f"its content is not {asset.title}")
                return content
            except OSError as error:
                if error.errno in _NO_ROOM:
                    raise
                raise SourceError(error.strerror or str(error)) from error
            except DamagedError:
                # What an earlier process left may have been spoilt since: once from scratch.
                shutil.rmtree(partial, ignore_errors=True)
                if not resumed:
                    raise
                resumed = False


def _store(asset: Asset, content: Content, folder: Path, origin: str) -> None:
    """Commit every file, then the manifest that makes them count."""
    sums = {name: atomic.write_with(folder / name, content.files[name]) for name in asset.stored}
    manifest = {"format": FORMAT, "asset": asset.name, "sha256": asset.sha256}
    atomic.write_json(folder / _MANIFEST, manifest | {"source": origin, "files": sums})
    shutil.rmtree(folder / ".partial", ignore_errors=True)
