"""`ImageSet`, the interface of every data set of images, and its pixel sources."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import IO, ClassVar, Protocol

import numpy as np
from accelerate import Accelerator

from pipeline.errors import UserError
from pipeline.runtime.console import Progress
from pipeline.runtime.distributed import errors_on_all_ranks
from pipeline.storage import atomic
from pipeline.storage.paths import data_root

#: class names of data sets whose files number the classes; Krizhevsky, "Learning multiple layers
#: of features from tiny images" (2009)
CLASS_NAMES: dict[str, tuple[str, ...]] = {
    "cifar10": (
        "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
    ),
}  # fmt: skip


class Pixels(Protocol):
    """Source of the pixels of a data set."""

    @property
    def random_access(self) -> bool:
        """True if images at any indices are read quickly."""
        ...

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Read images at rising indices, int64 (n,); return a copy, uint8 (n, C, H, W)."""
        ...

    def labels(self) -> np.ndarray | None:
        """Return the class of every image, integers (N,) from 0; None without classes."""
        ...


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Data set of images of one size in a fixed order.

    Attributes:
        name: "mnist", "cifar10", "imagenet32", "npz", that of a plug-in, or "folder" for folders,
            tables and tar shards; names of joined sets have a "+".
        split: "train", "test" or "val".
        shape: (C, H, W) of one image.
        fingerprint: sha256 (hex) of content, split, preprocessing and limit; sets of equal
            fingerprints hold the same images in the same order.
        count: number of images N.
        pixels: source of the pixels.
        class_names: names of a folder's classes in the order of their indices. The indices belong
            to this split.
    """

    name: str
    split: str
    shape: tuple[int, int, int]
    fingerprint: str
    count: int
    pixels: Pixels
    class_names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return self.count

    @cached_property
    def labels(self) -> np.ndarray | None:
        """Class of every image, int64 (N,) from 0; None without classes."""
        labels = self.pixels.labels()
        return None if labels is None else np.asarray(labels[: self.count], np.int64)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Read the images start … stop - 1, a copy, uint8 (stop - start, C, H, W).

        Raises:
            IndexError: the range is not within the data set.
        """
        if not 0 <= start <= stop <= self.count:
            raise IndexError(f"images {start} to {stop} requested; {self.name} has {self.count}")
        return self._take(np.arange(start, stop))

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Read images uint8 (n, C, H, W) at indices (n,) in any order; read repeated ones once.

        Raises:
            IndexError: an index is not within the data set.
        """
        indices = np.asarray(indices, np.int64)
        unique, inverse = np.unique(indices, return_inverse=True)
        if len(unique) and (unique[0] < 0 or unique[-1] >= self.count):
            raise IndexError(f"images {unique[0]} to {unique[-1]} requested, of {self.count}")
        return self._take(unique)[inverse]

    def _take(self, indices: np.ndarray) -> np.ndarray:
        """Read images at rising indices."""
        return self.pixels.take(indices) if len(indices) else np.empty((0, *self.shape), np.uint8)


@dataclass(frozen=True, eq=False)
class ArrayPixels:
    """Pixels in an array, in memory or mapped from a file."""

    images: np.ndarray
    classes: np.ndarray | None
    random_access: ClassVar[bool] = True

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Read images by index; see `Pixels.take`."""
        return np.asarray(self.images[indices])

    def labels(self) -> np.ndarray | None:
        """Return the classes; see `Pixels.labels`."""
        return self.classes


def image_set_of(
    images: np.ndarray, labels: np.ndarray | None, name: str, split: str = "train"
) -> ImageSet:
    """Return images uint8 (n, C, H, W) with labels (n,) as a data set."""
    digest = hashlib.sha256(f"{images.shape}".encode())
    digest.update(np.ascontiguousarray(images).tobytes())
    if labels is not None:
        labels = np.asarray(labels, np.int64)
        digest.update(labels.tobytes())
    _, channels, height, width = images.shape
    return ImageSet(
        name=name,
        split=split,
        shape=(channels, height, width),
        fingerprint=fingerprint({"name": name, "split": split, "content": digest.hexdigest()}),
        count=len(images),
        pixels=ArrayPixels(images, labels),
    )


def fingerprint(parts: Mapping[str, object]) -> str:
    """Return the sha256 (hex) of named parts, independent of their order."""
    text = json.dumps(dict(parts), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def apply_limit(count: int, limit: int | None) -> tuple[int, dict[str, object]]:
    """Return the number of images under a limit and its entry of the fingerprint."""
    if limit is None or limit >= count:
        return count, {}
    return limit, {"limit": limit}


def join(parts: Sequence[ImageSet]) -> ImageSet:
    """Concatenate data sets; the result has no classes, since the sets number them apart.

    A single set is returned unchanged.

    Raises:
        UserError: the images have different shapes.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    for part in parts[1:]:
        if part.shape != first.shape:
            raise UserError(
                f"data.also: images of {part.name} have shape {part.shape}; expected "
                f"{first.shape} as in {first.name}; join only data sets of one shape"
            )
    return ImageSet(
        name="+".join(part.name for part in parts),
        split="+".join(part.split for part in parts),
        shape=first.shape,
        fingerprint=fingerprint({"joined": [part.fingerprint for part in parts]}),
        count=sum(len(part) for part in parts),
        pixels=_JoinedPixels(parts),
    )


class _JoinedPixels:
    """Pixels of concatenated data sets."""

    def __init__(self, parts: Sequence[ImageSet]) -> None:
        self.parts = parts
        self.random_access = all(part.pixels.random_access for part in parts)
        self.begins = [0, *accumulate(len(part) for part in parts)]

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Read images by index; see `Pixels.take`."""
        bounds = pairwise(np.searchsorted(indices, self.begins))
        rows = zip(self.parts, self.begins, bounds, strict=False)
        return np.concatenate([part.take(indices[a:b] - begin) for part, begin, (a, b) in rows])

    def labels(self) -> None:
        """Return None: the classes of the parts are not comparable."""
        return


_ROWS = 10000


def with_random_access(images: ImageSet, accelerator: Accelerator, progress: Progress) -> ImageSet:
    """Return the images with fast random access; slow files are copied to one mapped array.

    A random batch of ImageNet-32 would open its ten files, of 128 000 images each, at every step.
    The main process stores the array under the data root, 3 072 bytes per image of 3x32x32.

    Raises:
        JkoflowError: the disk is full or read-only, or a file is damaged.
    """
    if images.pixels.random_access:
        return images
    path = data_root() / "pixels" / f"{images.name}-{images.fingerprint[:16]}.npy"

    def fill(file: IO[bytes]) -> None:
        shape = (len(images), *images.shape)
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        starts = range(0, len(images), _ROWS)
        for start in progress(starts, len(starts), "unpack images"):
            file.write(images.read(start, min(start + _ROWS, len(images))).tobytes())

    with errors_on_all_ranks(accelerator):
        if accelerator.is_main_process and not path.is_file():
            atomic.remove_temporaries(path.parent)
            atomic.write_with(path, fill)
    accelerator.wait_for_everyone()
    array = ArrayPixels(np.load(path, mmap_mode="r"), images.labels)
    return dataclasses.replace(images, pixels=array)
