"""Data sets in tables, tar shards or remote folders, unpacked once to a folder of image files.

The folder reader then reads them, so pixels, order, classes and fingerprint are those of a folder
with the same files. Tables are parquet and arrow files as the hub's datasets have them.
"""

from __future__ import annotations

import json
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

from eval.sets.tables import SUFFIXES, TableImages
from pipeline.config.data import DataConfig
from pipeline.data.image_folder import ENDINGS
from pipeline.errors import UserError
from pipeline.integrity import hub
from pipeline.integrity.limits import require_size
from pipeline.storage.paths import data_root
from pipeline.storage.shards import content_key

FOLDERS = ("folder", "hf", "webdataset")
"""Data sets that are read as folders of images."""

#: file of one image: its split or an empty text, its path, and its bytes
Entry = tuple[str, str, bytes]
_SPLITS = {"train": "train", "training": "train", "test": "test", "val": "test",
           "valid": "test", "validation": "test"}  # fmt: skip
_LABELS = ("label", "labels", "class", "cls", "fine_label")
_MAGIC = ((b"\x89PNG", ".png"), (b"\xff\xd8", ".jpg"), (b"RIFF", ".webp"), (b"GIF8", ".gif"),
          (b"BM", ".bmp"), (b"II*", ".tif"), (b"MM\0*", ".tif"))  # fmt: skip


def folder_of(data: DataConfig) -> Path:
    """Return the folder of a data set's images; unpack or download it at its first use.

    `folder` is a local folder, or one of any file system of fsspec (`s3://…`). `hf` is a local
    table, a folder of tables, or OWNER/NAME of a data set on the hub. `webdataset` is a tar file
    or a folder of them. A file whose path names a split (train, test, validation) belongs to it.

    Raises:
        UserError: nothing is there, or its content is of another kind.
        ValueError: a table is damaged or has no images, or the hub cannot be reached.
    """
    if not data.path:
        raise UserError(f"data.path is null; set it to the images of data.name={data.name}")
    if data.name == "folder":
        return _remote(data.path) if "://" in data.path else Path(data.path).expanduser()
    if data.name == "webdataset":
        files = _files(Path(data.path).expanduser(), (".tar",))
        return _unpack(data, files, lambda: _tar_entries(files))
    path = Path(data.path).expanduser()
    if not path.exists() and data.path.count("/") == 1:
        path = hub.download(f"hf://{data.path}", [f"*{s}" for s in SUFFIXES], "dataset")
    files = _files(path, SUFFIXES)
    return _unpack(data, files, lambda: _table_entries(files, data.columns))


def _files(path: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """List the files of a path by their names in it; a file is its own only one."""
    if path.is_file():
        return {path.name: path}
    found = {
        file.relative_to(path).as_posix(): file
        for file in sorted(path.rglob("*")) if file.suffix in suffixes and file.is_file()
    }  # fmt: skip
    if not found:
        raise UserError(
            f"data.path is {path}, which has no {' or '.join(suffixes)}; set it to such a file, "
            "or to a folder of them"
        )
    return found


def _unpack(
    data: DataConfig, files: dict[str, Path], entries: Callable[[], Iterator[Entry]]
) -> Path:
    """Return the folder with the images of some files, written under the data root once."""
    stamps = [[name, (s := f.stat()).st_size, s.st_mtime_ns] for name, f in files.items()]
    return _once({"name": data.name, "files": stamps, "columns": data.columns}, entries)


def _once(identity: dict[str, Any], entries: Callable[[], Iterator[Entry]]) -> Path:
    """Write entries to a folder under the data root, which appears when it is complete."""
    folder = data_root() / "unpacked" / content_key(identity)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unpack-", dir=folder.parent) as scratch:
        inside = Path(scratch) / "images"
        inside.mkdir()
        for split, name, content in entries():
            target = inside / split / _safe(name)
            if target.exists():
                raise UserError(f"two images are called {split}/{name}; expected one of a name")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        try:
            os.replace(inside, folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    return folder


def _safe(name: str) -> PurePosixPath:
    """Return a relative path of a stranger's name."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or not path.parts:
        raise UserError(f"an image is called {name!r}; expected a relative path")
    return path


def _split_of(name: str) -> str:
    """Return the split that a file's path names, or an empty text."""
    words = name.lower().replace("-", "/").replace("_", "/").replace(".", "/").split("/")
    return next((_SPLITS[word] for word in words if word in _SPLITS), "")


def _table_entries(files: dict[str, Path], columns: list[str]) -> Iterator[Entry]:
    """Yield the images of tables; a class is the folder of its images."""
    splits = {name: _split_of(name) for name in files}
    named = any(splits.values())
    for name, file in files.items():
        table = TableImages(file, columns[0] if columns else None)
        known = table.column_names
        label = columns[1] if len(columns) > 1 else next((k for k in _LABELS if k in known), None)
        if label is not None:
            table.require_column(label)
        classes = table.class_names(label) if label else None
        split = splits[name] or ("train" if named else "")
        stem = PurePosixPath(name).with_suffix("").as_posix().replace("/", "-")
        for row, (content, _, values, path) in enumerate(table.pictures([label] if label else [])):
            data = content.getvalue()
            own = PurePosixPath(path).name if path else f"{stem}-{row:08d}{_ending(data)}"
            folder = _class(values[0], classes) + "/" if values else ""
            yield split, folder + own, data


def _class(value: Any, names: list[str] | None) -> str:  # noqa: ANN401 - a cell of a table
    """Return the name of a class; numbers without names have five digits, so that they sort."""
    if isinstance(value, int):
        return names[value] if names and 0 <= value < len(names) else f"{value:05d}"
    if not isinstance(value, str):
        raise UserError(f"a class is {value!r}; expected an integer or a text")
    return value.replace("/", "-")


def _ending(data: bytes) -> str:
    """Return the ending of an image file by its first bytes."""
    return next((ending for magic, ending in _MAGIC if data.startswith(magic)), ".png")


def _tar_entries(files: dict[str, Path]) -> Iterator[Entry]:
    """Yield the images of tar shards; members of one key are one sample, with `.cls` its class."""
    splits = {name: _split_of(name) for name in files}
    named = any(splits.values())
    for name, file in files.items():
        split = splits[name] or ("train" if named else "")
        try:
            with tarfile.open(file, "r:") as archive:
                for key, parts in _samples(archive, file):
                    pictures = [e for e in parts if e in ENDINGS]
                    if not pictures:
                        continue
                    label = _tar_label(parts)
                    folder = f"{label}/" if label is not None else ""
                    yield split, f"{folder}{key}{pictures[0]}", parts[pictures[0]]
        except (tarfile.TarError, EOFError) as error:
            raise UserError(f"{file} is not a complete tar file ({error})") from error


def _samples(archive: tarfile.TarFile, file: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield key and parts by ending of every sample; the parts of a sample are neighbours."""
    key, parts = "", dict[str, bytes]()
    for member in archive:
        if not member.isreg():
            continue
        folder, _, base = member.name.rpartition("/")
        stem, _, ending = base.partition(".")
        own = f"{folder}/{stem}" if folder else stem
        if own != key and parts:
            yield key, parts
            parts = {}
        require_size(member.size, f"{member.name} of {file}")
        stream: IO[bytes] | None = archive.extractfile(member)
        key, parts[f".{ending.lower()}"] = own, b"" if stream is None else stream.read()
    if parts:
        yield key, parts


def _tar_label(parts: dict[str, bytes]) -> str | None:
    """Return the class of a sample: its `.cls`, or the entry `label` of its `.json`."""
    if ".cls" in parts:
        text = parts[".cls"].decode(errors="replace").strip()
        return _class(int(text) if text.isdigit() else text, None)
    try:
        content = json.loads(parts.get(".json", b"null"))
    except ValueError:
        return None
    value = content.get("label") if isinstance(content, dict) else None
    return None if value is None else _class(value, None)


def _remote(url: str) -> Path:
    """Return the local copy of a folder of a file system of fsspec."""
    import fsspec

    try:
        system, root = fsspec.core.url_to_fs(url)
        listing = system.find(root, detail=True)
    except Exception as error:  # noqa: BLE001 - file systems raise errors of many libraries
        raise UserError(
            f"data.path is {url}, which cannot be read ({' '.join(str(error).split())[:200]}); "
            "install the file system's library (s3://: pip install s3fs) or check the address"
        ) from error
    names = {
        os.path.relpath(path, root): path
        for path in sorted(listing) if path.lower().endswith(ENDINGS)
    }  # fmt: skip
    if not names:
        raise UserError(f"data.path is {url}, which has no images; expected .png, .jpg, …")
    require_size(max(listing[path]["size"] for path in names.values()), url)
    facts = [
        [name, listing[path]["size"], str(listing[path].get("ETag") or listing[path].get("mtime")
         or listing[path].get("created"))]
        for name, path in names.items()
    ]  # fmt: skip
    return _once(
        {"url": url, "files": facts},
        lambda: (("", name, system.cat_file(path)) for name, path in names.items()),
    )
