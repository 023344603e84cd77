"""Finds the raw files of an asset in a file, a folder or an archive."""

from __future__ import annotations

import gzip
import lzma
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO

from pipeline.assets.download import DamagedError
from pipeline.integrity.limits import require_archive_size, require_size
from pipeline.integrity.reason import reason_of

_ARCHIVES = (".tgz", ".tar.gz", ".tar", ".zip", ".whl")
_DEPTH = 3
_CHUNK = 1 << 20


def find_files(raw: Path, names: Sequence[str], scratch: Path) -> dict[str, Path]:
    """Find files by bare name, in folders to a depth of three and in the archives there.

    `raw` is a file, an archive, or a folder of either. Only the wanted files are unpacked into the
    folder `scratch`, under their bare names.

    Raises:
        DamagedError: an archive is damaged, and no file was found elsewhere.
    """
    files: dict[str, Path] = {}
    archives: list[Path] = []
    for path in _walk(raw):
        if path.name in names:
            files.setdefault(path.name, path)
        elif path.name.endswith(_ARCHIVES):
            archives.append(path)
    damage: DamagedError | None = None
    for archive in archives:
        missing = [name for name in names if name not in files]
        try:
            files |= _unpack(archive, missing, scratch) if missing else {}
        except DamagedError as error:  # the archive may belong to another asset
            damage = damage or error
    if damage is not None and not files:
        raise damage
    return files


def read_bytes(path: Path) -> bytes:
    """Read a file; decompress it if its name ends in `.gz`.

    Raises:
        DamagedError: the file is damaged or larger than the limit.
    """
    try:
        require_size(path.stat().st_size, path)
        if path.suffix != ".gz":
            return path.read_bytes()
        size = 0
        with gzip.open(path) as file:
            while chunk := file.read(_CHUNK):  # counted before any of it is kept
                size += len(chunk)
                require_size(size, path)
            file.seek(0)
            return file.read()
    except (EOFError, gzip.BadGzipFile, zlib.error, ValueError) as error:
        raise DamagedError(f"{path.name} is damaged ({reason_of(error)})") from error


def _walk(raw: Path) -> Iterator[Path]:
    """Yield the files under `raw`, sorted, to a depth of `_DEPTH` folders."""
    if raw.is_file():
        yield raw
        return
    for folder, subfolders, files in os.walk(raw):
        depth = len(Path(folder).relative_to(raw).parts)
        subfolders[:] = sorted(subfolders) if depth < _DEPTH else []
        for name in sorted(files):
            yield Path(folder) / name


def _unpack(archive: Path, names: Sequence[str], scratch: Path) -> dict[str, Path]:
    """Unpack the wanted members of an archive; return their paths by bare name."""
    unpacked: dict[str, Path] = {}

    def copy(member: str, stream: IO[bytes]) -> None:
        name = PurePosixPath(member).name
        unpacked[name] = scratch / f"unpacked-{name}"
        with stream, open(unpacked[name], "wb") as target:
            shutil.copyfileobj(stream, target, _CHUNK)

    try:
        if archive.suffix in (".zip", ".whl"):
            with zipfile.ZipFile(archive) as zipped:
                require_archive_size(zipped, archive)
                for entry in zipped.infolist():
                    if PurePosixPath(entry.filename).name in names and not entry.is_dir():
                        copy(entry.filename, zipped.open(entry))
        else:
            with tarfile.open(archive) as tar:
                for member in tar:
                    require_size(member.offset_data + member.size, archive)
                    stream = tar.extractfile(member) if member.isfile() else None
                    if stream is not None and PurePosixPath(member.name).name in names:
                        copy(member.name, stream)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, gzip.BadGzipFile,
            lzma.LZMAError, RuntimeError, ValueError) as error:  # fmt: skip
        raise DamagedError(f"{archive.name} is damaged ({reason_of(error)})") from error
    return unpacked
