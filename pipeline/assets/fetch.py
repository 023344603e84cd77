"""Fetches an asset from its mirrors, verifies it and stores it under the data root.

Every mirror must match one sha256 of the content. The folder `<data root>/assets/<name>/` holds
the files and a manifest with the sha256 of each, which is checked at every access. One process at
a time fetches; the others wait for it.
"""

from __future__ import annotations

import errno
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

from pipeline.assets.catalogue import ASSETS, Asset
from pipeline.assets.download import DamagedError, MirrorError
from pipeline.assets.mirrors import Mirror, local_files
from pipeline.assets.readers import Content
from pipeline.errors import JkoflowError, UserError
from pipeline.storage import atomic
from pipeline.storage.lock import locked
from pipeline.storage.paths import data_root

FORMAT = 1
_MANIFEST = "manifest.json"

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}

_verified: dict[Path, tuple[object, ...]] = {}

Log = Callable[[str], object]


def fetch_asset(name: str, *, local: Path | None = None, log: Log = print) -> Path:
    """Fetch an asset, a key of `ASSETS`, unless it is stored already, and verify it.

    A file, archive or folder `local` replaces the mirrors. The result is the folder of the stored
    files; for "inception" the safetensors file.

    Raises:
        UserError: the asset is unknown, or `local` does not exist or is not the asset.
        JkoflowError: every mirror failed, or the disk is full or read-only.
    """
    if name not in ASSETS:
        raise UserError(f"asset {name!r} is unknown; choose one of {', '.join(ASSETS)}")
    return install_asset(ASSETS[name], data_root(), local=local, log=log)


def install_asset(
    asset: Asset, root: Path, *, local: Path | None = None, log: Log = print
) -> Path:
    """Fetch an asset of any catalogue; see `fetch_asset`."""
    if local is not None and not local.exists():
        raise UserError(f"{local} does not exist; give the path of a copy of {asset.title}")
    folder = root / "assets" / asset.name
    result = folder / asset.result if asset.result else folder
    if _is_stored(asset, folder, log):
        return result
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, f"the folder of {asset.title}", log):
            # The previous holder of the lock may have fetched it.
            if not _is_stored(asset, folder, _silent):
                _try_mirrors(asset, folder, local, log)
    except OSError as error:
        raise JkoflowError(
            f"{asset.title} could not be stored in {folder} ({error.strerror or error}); free "
            "some space, or set JKOFLOW_HOME to another folder"
        ) from error
    return result


def _silent(_: str) -> None:
    """Ignore a message."""


def broken_files(name: str, root: Path) -> list[Path]:
    """Return the files of an asset below a data root that are missing or damaged.

    The manifest is one of them.
    """
    asset = ASSETS[name]
    folder = root / "assets" / name
    if _is_stored(asset, folder, _silent):
        return []
    broken = []
    for file in asset.stored:
        try:
            manifest = atomic.read_json(folder / _MANIFEST, "manifest")
            _verify(folder / file, str(manifest["files"][file]))
        except (UserError, KeyError, TypeError):
            broken.append(folder / file)
    return broken or [folder / _MANIFEST]


def _is_stored(asset: Asset, folder: Path, log: Log) -> bool:
    """Return whether the stored files are complete and of this asset; log the reason if not."""
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
        log(f"{asset.title}: the stored files cannot be used and are fetched again ({error})")
        return False
    return True


def _verify(path: Path, sha256: str) -> None:
    """Verify the hash of a file once per process, again only if the file changes."""
    state = path.stat() if path.is_file() else None
    stamp = state and (state.st_size, state.st_mtime_ns, state.st_ino, sha256)
    if stamp is None or _verified.get(path) != stamp:
        atomic.verify_file(path, sha256)
        if stamp is not None:
            _verified[path] = stamp


def _try_mirrors(asset: Asset, folder: Path, local: Path | None, log: Log) -> None:
    """Store the asset from the first mirror that delivers it."""
    by_hand = folder / "by-hand"
    mirrors = [local_files(local)] if local else [local_files(by_hand), *asset.mirrors]
    atomic.remove_temporaries(folder)
    reasons = []
    for mirror in mirrors:
        # A folder `by-hand` that does not exist is mentioned only if all mirrors fail.
        report = log if mirror is not mirrors[0] or local or by_hand.exists() else _silent
        report(f"{asset.title}: trying {mirror.label}")
        try:
            content = _read_mirror(asset, mirror, folder)
        except MirrorError as error:
            reasons.append(f"{mirror.label} ({error})")
            report(f"{asset.title}: not from {mirror.label}: {error}")
            continue
        _store(asset, content, folder, mirror.label)
        log(f"{asset.title}: fetched from {mirror.label}, stored in {folder}")
        return
    if local is not None:
        raise UserError(
            f"{local} is not {asset.title}: {reasons[0]}; give the path of a whole copy"
        )
    raise JkoflowError(
        f"{asset.title} could not be fetched from any mirror: {'; '.join(reasons)}; put "
        f"{asset.by_hand} into {by_hand} and try again"
    )


def _read_mirror(asset: Asset, mirror: Mirror, folder: Path) -> Content:
    """Download and read the files of one mirror, and verify the hash of their content.

    A MirrorError says why not. An OSError says that the disk is full, so that no mirror can help.
    """
    partial = folder / ".partial" / hashlib.sha256(mirror.label.encode()).hexdigest()[:12]
    resumed = partial.exists()
    while True:
        with atomic.scratch_folder(folder) as scratch:
            try:
                raw = mirror.download_files(partial, scratch)
                content = asset.read(raw, scratch)
                if content.sha256 != asset.sha256:
                    raise DamagedError(f"its content is not {asset.title}")
                return content
            except OSError as error:
                if error.errno in _NO_ROOM:
                    raise
                raise MirrorError(error.strerror or str(error)) from error
            except DamagedError:
                # The files of an earlier process may be damaged: download once from scratch.
                shutil.rmtree(partial, ignore_errors=True)
                if not resumed:
                    raise
                resumed = False


def _store(asset: Asset, content: Content, folder: Path, origin: str) -> None:
    """Write every file, then the manifest, which makes the asset complete."""
    sums = {name: atomic.write_with(folder / name, content.files[name]) for name in asset.stored}
    manifest = {"format": FORMAT, "asset": asset.name, "sha256": asset.sha256}
    atomic.write_json(folder / _MANIFEST, manifest | {"source": origin, "files": sums})
    shutil.rmtree(folder / ".partial", ignore_errors=True)
