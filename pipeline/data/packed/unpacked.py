"""Tables that are unpacked once, to a folder of image files under the data root."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from eval.sets.tables import SUFFIXES, TableImages
from pipeline.config.data import DataConfig
from pipeline.data.packed.places import class_name, relative_name, split_of
from pipeline.errors import UserError
from pipeline.integrity import hub
from pipeline.integrity.limits import require_size
from pipeline.runtime.console import say
from pipeline.storage import atomic, seal
from pipeline.storage.lock import locked
from pipeline.storage.paths import data_root, unwritable
from pipeline.storage.shards import content_key

#: bytes that the smallest file takes on most disks
_DISK_BLOCK = 4096
#: images together may exceed the limit as far as their files are that much smaller at most
_EXPANSION = 4
#: file of one image: its split or an empty text, its path, and its bytes
Entry = tuple[str, str, bytes]
_LABELS = ("label", "labels", "class", "cls", "fine_label")
_MAGIC = ((b"\x89PNG", ".png"), (b"\xff\xd8", ".jpg"), (b"RIFF", ".webp"), (b"GIF8", ".gif"),
          (b"BM", ".bmp"), (b"II*", ".tif"), (b"MM\0*", ".tif"))  # fmt: skip


def folder_of(data: DataConfig) -> Path:
    """Return a local folder of images; tables are unpacked to one at their first use.

    Raises:
        UserError: the folder does not exist or has no tables, or two images have one name.
        ValueError: a table is damaged.
    """
    if not data.path:
        raise UserError(f"data.path is null; set it to the images of data.name={data.name}")
    path = Path(data.path).expanduser()
    if data.name == "folder":
        if not path.is_dir():
            raise UserError(f"data.path is {path}, not a folder; set it to the folder of images")
        return path
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
    most = _EXPANSION * sum(file.stat().st_size for file in files.values())
    return _once({"name": data.name, "files": stamps, "columns": data.columns}, entries, most)


def _once(identity: dict[str, Any], entries: Callable[[], Iterator[Entry]], most: int) -> Path:
    """Write entries to a sealed folder under the data root, which appears when it is complete.

    The images together have at most `most` bytes, or those of `pipeline.integrity.limits`.
    """
    folder = data_root() / "unpacked" / content_key(identity)
    if folder.is_dir():
        return folder
    with locked(folder, "the unpacked images in", say), atomic.scratch_folder(
        folder.parent
    ) as scratch:
        if folder.is_dir():  # another process was faster
            return folder
        inside = scratch / "images"
        inside.mkdir()
        total, sums = 0, dict[str, str]()
        for split, name, content in entries():
            total += max(len(content), _DISK_BLOCK)
            if total > most:
                require_size(total, f"the images of {identity['name']}")
            target = inside / split / relative_name(name)
            if target.exists():
                raise UserError(f"two images are called {split}/{name}; expected one of a name")
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
            except OSError as error:  # of a full disk, or of a name that is too long
                raise unwritable(folder / split / name[:99], error, "unpacked") from error
            name_inside = target.relative_to(inside).as_posix()
            sums[name_inside] = hashlib.sha256(content).hexdigest()
        (inside / seal.NAME).write_bytes(seal.lines(sums))
        os.replace(inside, folder)
    return folder


def _table_entries(files: dict[str, Path], columns: list[str]) -> Iterator[Entry]:
    """Yield the images of tables; a class is the folder of its images."""
    splits = {name: split_of(name) for name in files}
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
            folder = class_name(values[0], classes) + "/" if values else ""
            yield split, folder + own, data


def _ending(data: bytes) -> str:
    """Return the ending of an image file by its first bytes."""
    return next((ending for magic, ending in _MAGIC if data.startswith(magic)), ".png")
