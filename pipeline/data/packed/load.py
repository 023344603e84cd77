"""Data sets in tar shards, tables or remote folders, read in place.

An index of the images holds their names, places and hashes. It is made in one pass over the data
and stored under the data root. Pixels and classes are those of a folder with the same files. The
images of tar shards and remote folders also have the order and the fingerprint of the folder. The
images of tables have the order of their rows, which are not sorted by class.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from pipeline.config.data import DataConfig
from pipeline.data.image_folder import (
    FolderPixels,
    check_format,
    choose_split,
    image_set_of_files,
    load_folder,
    prepare,
    splits_of,
)
from pipeline.data.image_set import ImageSet
from pipeline.data.packed.index import THREADS, index
from pipeline.data.packed.places import Place, split_names
from pipeline.data.packed.tables import TablePixels
from pipeline.errors import UserError
from pipeline.integrity.pictures import open_picture
from pipeline.integrity.reason import reason_of
from pipeline.storage.remote_files import is_url

FOLDERS = ("folder", "hf", "webdataset")
"""Data sets that are read as folders of images."""


def load_pictures(data: DataConfig, split: str) -> ImageSet:
    """Open the images of a folder, of tar shards or of tables.

    `folder` is a local folder, or one of any file system of fsspec (`s3://…`). `webdataset` is a
    tar file or a folder of them, in any such file system. `hf` is a parquet file or a folder of
    them, likewise, a local arrow file, or OWNER/NAME of a data set on the hub. A tar file or a
    table whose path names a split (train, test, validation) belongs to it.

    Raises:
        UserError: nothing is there, or its content is of another kind.
        ValueError: a table is damaged or has no images, or the hub cannot be reached.
    """
    if not _in_place(data):
        return load_folder(_folder_of(data), split, data.size, data.mode, data.limit)
    check_format(data.size, data.mode)
    url, places = index(data)
    chosen = choose_split(str(data.path), split_names(places), split)
    prefix = f"{chosen}/" if chosen else ""
    inside = {p.name.removeprefix(prefix): p for p in places if p.split == chosen}

    def pixels(names: tuple[str, ...], classes: tuple[str, ...] | None) -> FolderPixels:
        rows, size = tuple(inside[name] for name in names), data.size or 0
        if data.name == "hf":
            return TablePixels(Path(), names, classes, size, data.mode, url, data.columns, rows)
        return PackedPixels(Path(), names, classes, size, data.mode, url, rows)

    def hashes(names: Sequence[str]) -> list[dict[str, Any]]:
        return [{"size": inside[n].size, "sha256": inside[n].sha256} for n in names]

    names = list(inside) if data.name == "hf" else sorted(inside)
    return image_set_of_files(
        str(data.path), names, hashes, pixels, split, data.size, data.mode, data.limit
    )


def has_splits(data: DataConfig) -> bool:
    """Return whether the images of a data set have splits."""
    return bool(split_names(index(data)[1]) if _in_place(data) else splits_of(_folder_of(data)))


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
        with ThreadPoolExecutor(THREADS) as pool:
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
            reason = reason_of(error)
            raise UserError(
                f"image {place.name} in {place.file} could not be read ({reason}); repair or "
                "remove it"
            ) from error


def _in_place(data: DataConfig) -> bool:
    """Return whether the images of a data set are read where they are."""
    return data.name in ("webdataset", "hf") or is_url(data.path)


def _folder_of(data: DataConfig) -> Path:
    """Return a local folder of images."""
    if not data.path:
        raise UserError(f"data.path is null; set it to the images of data.name={data.name}")
    path = Path(data.path).expanduser()
    if not path.is_dir():
        raise UserError(f"data.path is {path}, not a folder; set it to the folder of images")
    return path
