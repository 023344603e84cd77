"""Loader of ImageNet-32 from its official files, npz or pickled batches.

Reference: Chrabaszcz, Loshchilov, Hutter 2017 (arXiv 1707.08819).
"""

from __future__ import annotations

import zipfile
import zlib
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np

from pipeline.data.file_index import FileRecord, file_records
from pipeline.data.image_set import ImageSet, apply_limit, fingerprint
from pipeline.errors import UserError
from pipeline.integrity.arrays import read_arrays, read_header
from pipeline.integrity.reason import reason_of
from pipeline.integrity.safe_pickle import load_batch

_TRAIN = tuple(f"train_data_batch_{i}" for i in range(1, 11))
_VAL = ("val_data",)
_VALUES = 3 * 32 * 32
#: errors of a damaged or encrypted archive
_DAMAGE = (ValueError, KeyError, EOFError, OSError, RuntimeError, NotImplementedError,
           AttributeError, zlib.error, zipfile.BadZipFile)  # fmt: skip


def load_imagenet32(folder: Path, split: str, limit: int | None) -> ImageSet:
    """Open ImageNet-32; the test split is the official validation set.

    The folder holds the files themselves, or `Imagenet32_train_npz`, `Imagenet32_train`,
    `Imagenet32_val_npz`, `Imagenet32_val` as the official archives unpack. Files after the last
    image within the limit are not opened.

    Raises:
        UserError: files are missing, damaged, or of another layout.
    """
    files_folder, names = _find_files(folder, split)
    records: list[FileRecord] = []
    for name in names:
        records += file_records(files_folder, [name], _count_rows)
        if limit is not None and sum(record["rows"] for record in records) >= limit:
            break
    rows = [int(record["rows"]) for record in records]
    count, extra = apply_limit(sum(rows), limit)
    if len(records) < len(names):  # the limit is the end of a file, and more files follow
        extra = {"limit": count}
    files = [[n, f["size"], f["sha256"]] for n, f in zip(names, records, strict=False)]
    return ImageSet(
        name="imagenet32",
        split=split,
        shape=(3, 32, 32),
        fingerprint=fingerprint({"name": "imagenet32", "files": files, **extra}),
        count=count,
        pixels=BatchFiles([files_folder / name for name in names[: len(records)]], rows),
    )


def _find_files(folder: Path, split: str) -> tuple[Path, tuple[str, ...]]:
    """Find the folder and names of a split's files, npz before pickles, all of one kind."""
    stems = _TRAIN if split == "train" else _VAL
    short = "train" if split == "train" else "val"
    incomplete: list[tuple[Path, list[str]]] = []
    for candidate in (folder, *(folder / f"Imagenet32_{short}{end}" for end in ("_npz", ""))):
        for ending in (".npz", ""):
            names = tuple(stem + ending for stem in stems)
            missing = [name for name in names if not (candidate / name).is_file()]
            if not missing:
                return candidate, names
            incomplete.append((candidate, missing))
    place, missing = min(incomplete, key=lambda entry: len(entry[1]))
    raise UserError(
        f"ImageNet-32 {short} is incomplete in {place}: {', '.join(missing)} missing; unpack its "
        "official archives there"
    )


class BatchFiles:
    """Pixels in several files; the file of the last access stays in memory."""

    random_access = False

    def __init__(self, paths: list[Path], rows: list[int]) -> None:
        self.paths = paths
        self.ends = list(accumulate(rows))
        self._index = -1
        self._images = np.empty((0, 3, 32, 32), np.uint8)

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Read images by index, only from their files; see `Pixels.take`."""
        images = np.empty((len(indices), 3, 32, 32), np.uint8)
        bounds = np.searchsorted(indices, [0, *self.ends])
        for file, (low, high) in enumerate(pairwise(bounds)):
            if low < high:
                begin = self.ends[file - 1] if file else 0
                images[low:high] = self._read_file(file)[indices[low:high] - begin]
        return images

    def _read_file(self, index: int) -> np.ndarray:
        """Read the images (n, 3, 32, 32) of a file unless they are in memory."""
        if index != self._index:
            self._index, self._images = -1, np.empty((0, 3, 32, 32), np.uint8)  # free it first
            images, _ = read_batch(self.paths[index])
            begin = self.ends[index - 1] if index else 0
            if len(images) != self.ends[index] - begin:
                raise UserError(f"{self.paths[index]} has changed while it was in use; run again")
            self._index, self._images = index, images
        return self._images

    def labels(self) -> np.ndarray:
        """Return the classes, int64 (N,): the official 1 … 1000 become 0 … 999."""
        return np.concatenate([read_labels(path) for path in self.paths])


def read_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read the images uint8 (n, 3, 32, 32) and classes int64 (n,) from 0 of an official file.

    Raises:
        UserError: the file is damaged, unsafe or of another layout; the message names it.
    """
    batch = _read_arrays(path, ("data", "labels"))
    images = batch.get("data")
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
        raise _not_a_batch(path, "it has no uint8 array `data`")
    if images.ndim != 2 or images.shape[1] != _VALUES:
        raise _not_a_batch(path, f"`data` has shape {images.shape}; expected (n, {_VALUES})")
    labels = _classes(path, batch.get("labels"))
    if len(labels) != len(images):
        raise _not_a_batch(path, f"it has {len(images)} images and {len(labels)} labels")
    return images.reshape(-1, 3, 32, 32), labels


def read_labels(path: Path) -> np.ndarray:
    """Read the classes of an official file, int64 (n,) from 0."""
    return _classes(path, _read_arrays(path, ("labels",)).get("labels"))


def _classes(path: Path, labels: object) -> np.ndarray:
    """Convert official labels from 1 to classes from 0, int64 (n,)."""
    values = np.asarray(labels)
    if values.ndim != 1 or values.dtype.kind not in "iu" or (len(values) and values.min() < 1):
        raise _not_a_batch(path, "its `labels` are not integers from 1")
    return values.astype(np.int64) - 1


def _count_rows(path: Path) -> FileRecord:
    """Count the images of a file; of an npz only the header of `data` is read."""
    if path.suffix != ".npz":
        return {"rows": len(read_batch(path)[0])}
    try:
        with zipfile.ZipFile(path) as archive, archive.open("data.npy") as member:
            shape, _, _ = read_header(member)
    except _DAMAGE as error:
        raise _not_a_batch(path, reason_of(error)) from error
    return {"rows": int(shape[0]) if shape else 0}


def _read_arrays(path: Path, wanted: tuple[str, ...]) -> dict[str, object]:
    """Read the wanted entries of an npz, or all entries of a pickled batch."""
    try:
        if path.suffix != ".npz":
            return dict(load_batch(path))
        return dict(read_arrays(path, wanted))
    except _DAMAGE as error:
        raise _not_a_batch(path, reason_of(error)) from error


def _not_a_batch(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path} is not a batch of ImageNet-32 ({reason}); unpack the official archive again"
    )
