"""Images of parquet and arrow files, as the hub's data sets have them, read in place.

A parquet file is decoded by groups of rows. The groups that were read last are kept within a bound
of bytes, so that neighbouring rows are decoded once. Of a larger group only the rows are kept that
are read.
"""

from __future__ import annotations

import bisect
import hashlib
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from io import BytesIO
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import IO, Any, ClassVar

import numpy as np

from eval.sets.tables import SUFFIXES, Table, choose_column
from pipeline.config.data import DataConfig
from pipeline.data.image_folder import FolderPixels, prepare
from pipeline.data.packed.places import Place, class_name, relative_name, split_of
from pipeline.errors import UserError
from pipeline.integrity import hub
from pipeline.integrity.limits import limit, require_size
from pipeline.integrity.pictures import open_picture
from pipeline.integrity.reason import reason_of
from pipeline.storage.remote_files import is_url

#: images together may exceed the limit as far as their files are that much smaller at most
_EXPANSION = 4
#: part of the limit that the images of decoded groups may take
_PART = 8
#: files that are kept open
_OPEN = 32
_THREADS = 4
_LABELS = ("label", "labels", "class", "cls", "fine_label")
_MAGIC = ((b"\x89PNG", ".png"), (b"\xff\xd8", ".jpg"), (b"RIFF", ".webp"), (b"GIF8", ".gif"),
          (b"BM", ".bmp"), (b"II*", ".tif"), (b"MM\0*", ".tif"))  # fmt: skip


def place_of_tables(data: DataConfig) -> str:
    """Return the place of the tables of a data set; one of the hub is downloaded.

    Raises:
        ValueError: the hub cannot be reached or has no such data set.
    """
    assert data.path
    path = Path(data.path).expanduser()
    if not is_url(data.path) and not path.exists() and data.path.count("/") == 1:
        return str(hub.download(f"hf://{data.path}", [f"*{s}" for s in SUFFIXES], "dataset"))
    return data.path


def table_places(
    system: Any, files: dict[str, dict[str, Any]], columns: list[str]  # noqa: ANN401
) -> Iterator[Place]:
    """Yield the images of tables in the order of their rows, with their row as `offset`.

    Args:
        system: of fsspec.
        files: their properties by their names in the data set.
        columns: of the images and of the classes; empty takes usual names.

    Raises:
        UserError: a class is neither an integer nor a text, or a name leads out of its folder.
        ValueError: a table is damaged, has no such columns, or claims too many bytes.
    """
    splits = {name: split_of(name) for name in files}
    named, total = any(splits.values()), 0
    most = _EXPANSION * sum(int(info["size"]) for info in files.values())
    for name, info in files.items():
        table = open_table(system, str(info["name"]))
        column, label = _columns(table, columns)
        classes = table.class_names(label) if label else None
        split = splits[name] or ("train" if named else "")
        stem = PurePosixPath(name).with_suffix("").as_posix().replace("/", "-")
        rows = table.pictures(column, [label] if label else [])
        for row, (content, values, path) in enumerate(rows):
            total += len(content)
            if total > most:
                require_size(total, "the images of hf")
            own = PurePosixPath(path).name if path else f"{stem}-{row:08d}{_ending(content)}"
            folder = class_name(values[0], classes) + "/" if values else ""
            own = relative_name(folder + own).as_posix()
            sha256 = hashlib.sha256(content).hexdigest()
            own = f"{split}/{own}" if split else own
            yield Place(own, str(info["name"]), row, len(content), sha256, split)


def open_table(system: Any, file: str) -> Table:  # noqa: ANN401 - untyped library
    """Open a table of a file system of fsspec.

    Raises:
        UserError: it is an arrow file that is not local.
        ValueError: it is damaged.
    """
    if "file" in np.atleast_1d(system.protocol):
        return Table(Path(file))
    if not file.endswith(".parquet"):
        raise UserError(
            f"{file} is an arrow file at an address; expected parquet there; write it as parquet, "
            "or copy it to a disk"
        )
    source: IO[bytes] = system.open(file, "rb")
    return Table(file, source)


@dataclass(frozen=True, eq=False)
class TablePixels(FolderPixels):
    """Pixels of images in tables, read and decoded on access; random access would be slow."""

    url: str
    columns: list[str]
    places: tuple[Place, ...]
    random_access: ClassVar[bool] = False
    _tables: OrderedDict[str, tuple[Table, str, list[int]]] = field(default_factory=OrderedDict)
    _groups: OrderedDict[tuple[str, int], dict[int, bytes]] = field(default_factory=OrderedDict)

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Read images by index, decoded in threads; see `Pixels.take`."""
        wanted: dict[tuple[str, int], list[tuple[int, int]]] = defaultdict(list)
        for position, index in enumerate(indices):
            place = self.places[index]
            starts = self._opened(place.file)[2]
            group = bisect.bisect_right(starts, place.offset) - 1
            wanted[place.file, group].append((position, place.offset - starts[group]))
        out: list[np.ndarray | None] = [None] * len(indices)
        with ThreadPoolExecutor(_THREADS) as pool:
            for key, rows in wanted.items():
                contents = self._contents(key, {row for _, row in rows})
                jobs = [(self.places[indices[p]], contents[row]) for p, row in rows]
                for (position, _), image in zip(rows, pool.map(self._decode, jobs), strict=True):
                    out[position] = image
        return np.stack([image for image in out if image is not None])

    def _opened(self, file: str) -> tuple[Table, str, list[int]]:
        """Return a table, its column of images, and the first row of every group."""
        import fsspec

        if file not in self._tables:
            if len(self._tables) >= _OPEN:
                self._tables.popitem(last=False)
            try:
                table = open_table(fsspec.core.url_to_fs(self.url)[0], file)
                column, _ = _columns(table, self.columns)
            except Exception as error:  # file systems raise many kinds of errors
                raise _unreadable(f"table {file}", error) from error
            self._tables[file] = table, column, list(accumulate(table.groups, initial=0))[:-1]
        self._tables.move_to_end(file)
        return self._tables[file]

    def _contents(self, key: tuple[str, int], rows: set[int]) -> dict[int, bytes]:
        """Return the encoded images of some rows of a group, which is kept if it is small."""
        if key in self._groups:
            self._groups.move_to_end(key)
            return self._groups[key]
        file, group = key
        table, column, _ = self._opened(file)
        most = limit() // _PART
        try:
            if table.is_mapped or table.group_bytes(group) > most:
                return dict(table.group_pictures(group, column, rows))
            kept, size = dict[int, bytes](), 0
            for row, content in table.group_pictures(group, column, range(table.groups[group])):
                kept[row], size = content, size + len(content)
                if size > most:  # cells share values
                    return dict(table.group_pictures(group, column, rows))
        except Exception as error:  # pyarrow and file systems raise many kinds of errors
            raise _unreadable(f"group {group} of rows of {file}", error) from error
        self._groups[key] = kept
        while sum(len(c) for g in self._groups.values() for c in g.values()) > most:
            self._groups.popitem(last=False)
        return kept

    def _decode(self, job: tuple[Place, bytes]) -> np.ndarray:
        """Decode an image as uint8 (C, size, size)."""
        place, content = job
        try:
            if hashlib.sha256(content).hexdigest() != place.sha256:
                raise ValueError("it has changed since it was indexed")
            with open_picture(BytesIO(content)) as image:
                return prepare(image, self.size, self.mode)
        except Exception as error:  # decoders raise many kinds of errors
            raise _unreadable(f"image {place.name} in {place.file}", error) from error


def _unreadable(what: str, error: Exception) -> UserError:
    """Return the error of something that could not be read."""
    reason = reason_of(error)
    return UserError(f"{what} could not be read ({reason}); repair or remove it")


def _columns(table: Table, columns: list[str]) -> tuple[str, str | None]:
    """Return the column of images, and that of classes or None."""
    column = choose_column(table.file, table, columns[0] if columns else None)
    known = table.columns
    usual = (k for k in _LABELS if k in known and table.has_classes(k))
    label = columns[1] if len(columns) > 1 else next(usual, None)
    if label is not None:
        table.require_column(label)
    return column, label


def _ending(data: bytes) -> str:
    """Return the ending of an image file by its first bytes."""
    return next((ending for magic, ending in _MAGIC if data.startswith(magic)), ".png")
