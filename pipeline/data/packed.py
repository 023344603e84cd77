"""Data sets in tar shards or remote folders, read in place, and tables, unpacked once.

An index of the images holds their names, places and hashes. It is made in one pass over the data
and stored under the data root. Tables are parquet and arrow files as the hub's datasets have them.
Their rows are not sorted by class, so they become a folder of image files. Pixels, order, classes
and fingerprint are those of a folder with the same files.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import IO, Any, ClassVar, NamedTuple

import numpy as np

from eval.sets.tables import SUFFIXES, TableImages
from pipeline.config.data import DataConfig
from pipeline.data.image_folder import (
    ENDINGS,
    FolderPixels,
    check_format,
    choose_split,
    image_set_of_files,
    load_folder,
    prepare,
    splits_of,
)
from pipeline.data.image_set import ImageSet
from pipeline.errors import UserError
from pipeline.integrity import hub
from pipeline.integrity.limits import require_size
from pipeline.integrity.pictures import open_picture
from pipeline.runtime.console import say
from pipeline.storage import atomic, seal
from pipeline.storage.lock import locked
from pipeline.storage.paths import data_root, unwritable
from pipeline.storage.shards import content_key

FOLDERS = ("folder", "hf", "webdataset")
"""Data sets that are read as folders of images."""

#: bytes that the smallest file takes on most disks
_DISK_BLOCK = 4096
#: images together may exceed the limit as far as their files are that much smaller at most
_EXPANSION = 4
#: file of one image: its split or an empty text, its path, and its bytes
Entry = tuple[str, str, bytes]
_SPLITS = {"train": "train", "training": "train", "test": "test", "val": "test",
           "valid": "test", "validation": "test"}  # fmt: skip
#: folders of splits
_FOLDERS = ("train", "test", "val")
#: images that are read at once
_THREADS = 8
_LABELS = ("label", "labels", "class", "cls", "fine_label")
_MAGIC = ((b"\x89PNG", ".png"), (b"\xff\xd8", ".jpg"), (b"RIFF", ".webp"), (b"GIF8", ".gif"),
          (b"BM", ".bmp"), (b"II*", ".tif"), (b"MM\0*", ".tif"))  # fmt: skip


class Place(NamedTuple):
    """Place of an image in a data set that is read in place.

    Attributes:
        name: relative path of the image, with its split in front if it has one.
        file: that holds it.
        offset: of its first byte.
        size: in bytes.
        sha256: of its content.
    """

    name: str
    file: str
    offset: int
    size: int
    sha256: str


def load_pictures(data: DataConfig, split: str) -> ImageSet:
    """Open the images of a folder, of tar shards or of tables.

    `folder` is a local folder, or one of any file system of fsspec (`s3://…`). `webdataset` is a
    tar file or a folder of them, in any such file system. `hf` is a local table, a folder of
    tables, or OWNER/NAME of a data set on the hub. A tar file or a table whose path names a split
    (train, test, validation) belongs to it.

    Raises:
        UserError: nothing is there, or its content is of another kind.
        ValueError: a table is damaged or has no images, or the hub cannot be reached.
    """
    if not _in_place(data):
        return load_folder(_folder_of(data), split, data.size, data.mode, data.limit)
    check_format(data.size, data.mode)
    places = _index(data)
    chosen = choose_split(str(data.path), _splits(places), split)
    prefix = f"{chosen}/" if chosen else ""
    inside = {p.name.removeprefix(prefix): p for p in places if p.name.startswith(prefix)}

    def pixels(names: tuple[str, ...], classes: tuple[str, ...] | None) -> PackedPixels:
        rows = tuple(inside[name] for name in names)
        return PackedPixels(
            Path(), names, classes, data.size or 0, data.mode, str(data.path), rows
        )

    def hashes(names: Sequence[str]) -> list[dict[str, Any]]:
        return [{"size": inside[n].size, "sha256": inside[n].sha256} for n in names]

    names = sorted(inside)
    return image_set_of_files(
        str(data.path), names, hashes, pixels, split, data.size, data.mode, data.limit
    )


def has_splits(data: DataConfig) -> bool:
    """Return whether the images of a data set have splits."""
    return bool(_splits(_index(data)) if _in_place(data) else splits_of(_folder_of(data)))


@dataclass(frozen=True, eq=False)
class PackedPixels(FolderPixels):
    """Pixels of images in tar files or of a remote folder, read and decoded on access."""

    url: str
    places: tuple[Place, ...]
    random_access: ClassVar[bool] = True

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Read images by index, in threads; see `Pixels.take`."""
        import fsspec

        system = fsspec.core.url_to_fs(self.url)[0]
        with ThreadPoolExecutor(_THREADS) as pool:
            read = pool.map(lambda index: self._read(system, self.places[index]), indices)
            return np.stack(list(read))

    def _read(self, system: Any, place: Place) -> np.ndarray:  # noqa: ANN401 - untyped library
        """Read an image as uint8 (C, size, size)."""
        end = place.offset + place.size
        try:
            content = system.cat_file(place.file, start=place.offset, end=end)
            if hashlib.sha256(content).hexdigest() != place.sha256:
                raise ValueError("it has changed since it was indexed")
            with open_picture(BytesIO(content)) as image:
                return prepare(image, self.size, self.mode)
        except Exception as error:  # decoders and file systems raise many kinds of errors
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"image {place.name} in {place.file} could not be read ({reason}); repair or "
                "remove it"
            ) from error


def _in_place(data: DataConfig) -> bool:
    """Return whether the images of a data set are read where they are."""
    return data.name == "webdataset" or data.name == "folder" and "://" in str(data.path)


def _splits(places: list[Place]) -> set[str]:
    """Return the names of the splits among the first folders of images."""
    return {place.name.split("/")[0] for place in places if "/" in place.name} & set(_FOLDERS)


def _index(data: DataConfig) -> list[Place]:
    """Return the places of all images; they are found and hashed in one pass, once."""
    url = str(data.path) if "://" in str(data.path) else str(Path(str(data.path)).expanduser())
    system, files = _listing(url, (".tar",) if data.name == "webdataset" else ENDINGS)
    facts = [
        [name, info["size"], str(info.get("ETag") or info.get("mtime") or info.get("created"))]
        for name, info in files.items()
    ]
    key = content_key({"name": data.name, "url": os.path.abspath(url) if "://" not in url else url,
                       "files": facts})  # fmt: skip
    path = data_root() / "packed" / f"{key}.json"
    if path.is_file():
        stored = atomic.read_json(path, "index of images", part=1)
        return [Place(*row) for row in stored]
    find = _tar_places if data.name == "webdataset" else _file_places
    places: dict[str, Place] = {}
    for place in find(system, files):
        if place.name in places:
            raise UserError(f"two images are called {place.name}; expected one of a name")
        places[place.name] = place
    atomic.write_bytes(path, json.dumps(list(places.values())).encode(), sealed=False)
    return list(places.values())


def _listing(url: str, endings: tuple[str, ...]) -> tuple[Any, dict[str, dict[str, Any]]]:
    """Return a file system, and its files below an address by their names in it."""
    import fsspec

    kinds = " or ".join(endings[:2])
    try:
        system, root = fsspec.core.url_to_fs(url)
        listing = system.find(root, detail=True)
    except Exception as error:  # noqa: BLE001 - file systems raise errors of many libraries
        raise UserError(
            f"data.path is {url}, which cannot be read ({' '.join(str(error).split())[:200]}); "
            "install the file system's library (s3://: pip install s3fs) or check the address"
        ) from error
    info = listing.get(root) or (system.info(root) if root in listing else {})
    if info.get("type") == "file":
        return system, {PurePosixPath(root).name: info | {"name": root}}
    files = {
        os.path.relpath(path, root): info | {"name": path}
        for path, info in sorted(listing.items())
        if path.lower().endswith(endings) and info.get("type", "file") == "file"
    }
    files = {n: info for n, info in files.items() if not f"/{n}".count("/.")}
    if not files:
        what = "images" if endings is ENDINGS else "tar files"
        raise UserError(f"data.path is {url}, which has no {what}; expected {kinds}, …")
    return system, files


def _file_places(system: Any, files: dict[str, dict[str, Any]]) -> Iterator[Place]:  # noqa: ANN401
    """Yield the places of files of images, which are read to hash them."""

    def place(name: str) -> Place:
        path, size = files[name]["name"], files[name]["size"]
        require_size(size, path)
        return Place(name, path, 0, size, hashlib.sha256(system.cat_file(path)).hexdigest())

    with ThreadPoolExecutor(_THREADS) as pool:
        yield from pool.map(place, files)


def _folder_of(data: DataConfig) -> Path:
    """Return a local folder of images; tables are unpacked to one at their first use."""
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
            target = inside / split / _safe(name)
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


def _tar_places(system: Any, files: dict[str, dict[str, Any]]) -> Iterator[Place]:  # noqa: ANN401
    """Yield the images of tar shards; members of one key are one sample, with `.cls` its class."""
    splits = {name: _split_of(name) for name in files}
    named = any(splits.values())
    for name, info in files.items():
        file, split = str(info["name"]), splits[name] or ("train" if named else "")
        try:
            with system.open(file, "rb") as raw, tarfile.open(fileobj=raw, mode="r:") as archive:
                for key, parts, offsets in _samples(archive, file):
                    ending = next((e for e in parts if e in ENDINGS), None)
                    if ending is None:
                        continue
                    label, content = _tar_label(parts), parts[ending]
                    folder = f"{label}/" if label is not None else ""
                    own = _safe(f"{folder}{key}{ending}").as_posix()
                    sha256 = hashlib.sha256(content).hexdigest()
                    own = f"{split}/{own}" if split else own
                    yield Place(own, file, offsets[ending], len(content), sha256)
                if info["size"] < archive.offset + tarfile.BLOCKSIZE:
                    raise EOFError("it ends without the block of zeros of a whole one")
        except (tarfile.TarError, EOFError) as error:
            raise UserError(f"{file} is not a complete tar file ({error})") from error


def _samples(
    archive: tarfile.TarFile, file: str
) -> Iterator[tuple[str, dict[str, bytes], dict[str, int]]]:
    """Yield key, parts by ending and their offsets of every sample, whose parts are neighbours."""
    key, parts, offsets = "", dict[str, bytes](), dict[str, int]()
    for member in archive:
        if not member.isreg():
            continue
        folder, _, base = member.name.rpartition("/")
        stem, _, ending = base.partition(".")
        own = f"{folder}/{stem}" if folder else stem
        if own != key and parts:
            yield key, parts, offsets
            parts, offsets = {}, {}
        require_size(member.size + sum(map(len, parts.values())), f"{member.name} of {file}")
        stream: IO[bytes] | None = archive.extractfile(member)
        key, ending = own, f".{ending.lower()}"
        parts[ending] = b"" if stream is None else stream.read()
        offsets[ending] = member.offset_data
    if parts:
        yield key, parts, offsets


def _tar_label(parts: dict[str, bytes]) -> str | None:
    """Return the class of a sample: its `.cls`, or the entry `label` of its `.json`."""
    if ".cls" in parts:
        text = parts[".cls"].decode(errors="replace").strip()
        return _class(int(text) if text.isdigit() else text, None)
    try:
        content = json.loads(parts.get(".json", b"null"))
    except (ValueError, RecursionError):
        return None
    value = content.get("label") if isinstance(content, dict) else None
    return None if value is None else _class(value, None)
