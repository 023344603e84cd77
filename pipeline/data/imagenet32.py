"""ImageNet-32 from its official files, npz or pickled batches, one file in memory at a time.

Reference: Chrabaszcz, Loshchilov, Hutter 2017 (arXiv 1707.08819).
"""

from __future__ import annotations

import zipfile
import zlib
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np

from pipeline.data.file_index import Facts, file_facts
from pipeline.data.image_set import ImageSet, fingerprint, limited
from pipeline.errors import UserError
from pipeline.storage.safe_pickle import UnsafePickleError, load_batch

_TRAIN = tuple(f"train_data_batch_{i}" for i in range(1, 11))
_VAL = ("val_data",)
_VALUES = 3 * 32 * 32


def load_imagenet32(folder: Path, split: str, limit: int | None) -> ImageSet:
    """Open ImageNet-32; the test split is the official validation set.

    Args:
        folder: holds the files themselves, or `Imagenet32_train_npz`, `Imagenet32_train`,
            `Imagenet32_val_npz`, `Imagenet32_val` as they come out of the archives.
        split: "train" or "test".
        limit: only the first so many; files after them are not looked into.

    Raises:
        UserError: files are missing, damaged, or of another layout.
    """
    place, names = _find_files(folder, split)
    facts: list[Facts] = []
    for name in names:
        facts += file_facts(place, [name], _rows)
        if limit is not None and sum(entry["rows"] for entry in facts) >= limit:
            break
    rows = [int(entry["rows"]) for entry in facts]
    count, extra = limited(sum(rows), limit)
    if len(facts) < len(names):  # the limit falls on the end of a file, and more would follow
        extra = {"limit": count}
    files = [[n, f["size"], f["sha256"]] for n, f in zip(names, facts, strict=False)]
    return ImageSet(
        name="imagenet32",
        split=split,
        shape=(3, 32, 32),
        fingerprint=fingerprint({"name": "imagenet32", "files": files, **extra}),
        count=count,
        pixels=BatchFiles([place / name for name in names[: len(facts)]], rows),
    )


def _find_files(folder: Path, split: str) -> tuple[Path, tuple[str, ...]]:
    """The folder and the names of a split's files: npz before pickles, all of them or none."""
    stems = _TRAIN if split == "train" else _VAL
    short = "train" if split == "train" else "val"
    nearest: tuple[Path, list[str], int] | None = None
    for place in (folder, folder / f"Imagenet32_{short}_npz", folder / f"Imagenet32_{short}"):
        for ending in (".npz", ""):
            names = tuple(stem + ending for stem in stems)
            missing = [name for name in names if not (place / name).is_file()]
            if not missing:
                return place, names
            if nearest is None or len(missing) < nearest[2]:
                nearest = (place, missing, len(missing))
    assert nearest is not None
    raise UserError(
        f"ImageNet-32 {short} is not whole in {nearest[0]}: {', '.join(nearest[1])} missing; "
        "unpack its official archives there"
    )


class BatchFiles:
    """Images spread over files, the last used of which stays in memory."""

    any_order = False

    def __init__(self, paths: list[Path], rows: list[int]) -> None:
        self.paths = paths
        self.ends = list(accumulate(rows))
        self._number = -1
        self._images = np.empty((0, 3, 32, 32), np.uint8)

    def take(self, numbers: np.ndarray) -> np.ndarray:
        """See `pipeline.data.image_set.Pixels.take`; opens only the files that hold them."""
        images = np.empty((len(numbers), 3, 32, 32), np.uint8)
        places = np.searchsorted(numbers, [0, *self.ends])
        for number, (low, high) in enumerate(pairwise(places)):
            if low < high:
                begin = self.ends[number - 1] if number else 0
                images[low:high] = self._file(number)[numbers[low:high] - begin]
        return images

    def _file(self, number: int) -> np.ndarray:
        if number != self._number:
            self._number, self._images = -1, np.empty((0, 3, 32, 32), np.uint8)  # free it first
            images, _ = read_batch(self.paths[number])
            begin = self.ends[number - 1] if number else 0
            if len(images) != self.ends[number] - begin:
                raise UserError(f"{self.paths[number]} has changed while it was in use; run again")
            self._number, self._images = number, images
        return self._images

    def labels(self) -> np.ndarray:
        """See `Pixels.labels`: official classes 1 … 1000 become 0 … 999."""
        return np.concatenate([read_labels(path) for path in self.paths])


def read_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """One official file.

    Returns:
        Images uint8 (n, 3, 32, 32) and classes int64 (n,) from 0.

    Raises:
        UserError: damaged, unsafe, or of another layout; the sentence names the file.
    """
    batch = _load(path, ("data", "labels"))
    images = batch.get("data")
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
        raise UserError(_unlike(path, "no uint8 array `data` in it"))
    if images.ndim != 2 or images.shape[1] != _VALUES:
        raise UserError(_unlike(path, f"`data` is {images.shape}, expected (n, {_VALUES})"))
    labels = _from_zero(path, batch.get("labels"))
    if len(labels) != len(images):
        raise UserError(_unlike(path, f"{len(images)} images and {len(labels)} labels"))
    return images.reshape(-1, 3, 32, 32), labels


def read_labels(path: Path) -> np.ndarray:
    """The classes of one official file, int64 (n,) from 0."""
    return _from_zero(path, _load(path, ("labels",)).get("labels"))


def _from_zero(path: Path, labels: object) -> np.ndarray:
    values = np.asarray(labels)
    if values.ndim != 1 or values.dtype.kind not in "iu" or (len(values) and values.min() < 1):
        raise UserError(_unlike(path, "its `labels` are not whole numbers from 1"))
    return values.astype(np.int64) - 1


def _rows(path: Path) -> Facts:
    """How many images a file holds; of an npz only the header of `data` is read."""
    if path.suffix != ".npz":
        return {"rows": len(read_batch(path)[0])}
    try:
        with zipfile.ZipFile(path) as archive, archive.open("data.npy") as member:
            version = np.lib.format.read_magic(member)
            header = np.lib.format.read_array_header_1_0
            shape, _, _ = (header if version == (1, 0) else np.lib.format.read_array_header_2_0)(
                member
            )
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError, zlib.error) as error:
        raise UserError(_unlike(path, str(error))) from error
    return {"rows": int(shape[0]) if shape else 0}


def _load(path: Path, wanted: tuple[str, ...]) -> dict[str, object]:
    try:
        if path.suffix != ".npz":
            return dict(load_batch(path))
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in wanted if name in archive.files}
    except UnsafePickleError as error:
        raise UserError(_unlike(path, str(error))) from error
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError) as error:
        raise UserError(_unlike(path, str(error))) from error


def _unlike(path: Path, reason: str) -> str:
    return f"{path} is not a batch of ImageNet-32 ({reason}); unpack the official archive again"
