"""One interface for every data set of images."""

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


class Pixels(Protocol):
    """Where the images of a data set come from.

    Attributes:
        any_order: whether few images are read quickly, wherever they lie.
    """

    @property
    def any_order(self) -> bool:
        """See above."""
        ...

    def take(self, numbers: np.ndarray) -> np.ndarray:
        """Images by number, int64 (n,) rising; uint8 (n, C, H, W), the caller's own copy."""
        ...

    def labels(self) -> np.ndarray | None:
        """The class of every image as integers from 0, or None."""
        ...


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images of one size in a fixed order.

    Attributes:
        name: "mnist", "cifar10", "imagenet32" or "folder"; of a joined set the names, with "+".
        split: "train" or "test".
        shape: (C, H, W) of one image.
        fingerprint: sha256 (hex) of the content, the split, the preprocessing and the limit;
            two sets with the same fingerprint hold the same images in the same order.
        count: number of images.
        pixels: where they come from.
        class_names: of a folder's classes, in the order of their numbers, which are this split's
            own; None where classes have numbers only, the same in all splits, or there are none.
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
        """int64 (N,), classes from 0; None when the images have none."""
        labels = self.pixels.labels()
        return None if labels is None else np.asarray(labels[: self.count], np.int64)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Images start … stop - 1.

        Args:
            start: in [0, N].
            stop: in [start, N].

        Returns:
            uint8 (stop - start, C, H, W), the caller's own copy.

        Raises:
            IndexError: the range leaves the data set.
        """
        if not 0 <= start <= stop <= self.count:
            raise IndexError(f"images {start} to {stop} asked for, {self.name} has {self.count}")
        return self._take(np.arange(start, stop))

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Images by number in the order asked for; repeats are read once.

        Args:
            indices: integers (n,) in [0, N), repeats allowed.

        Returns:
            uint8 (n, C, H, W).

        Raises:
            IndexError: a number leaves the data set.
        """
        indices = np.asarray(indices, np.int64)
        wanted, place = np.unique(indices, return_inverse=True)
        if len(wanted) and (wanted[0] < 0 or wanted[-1] >= self.count):
            raise IndexError(f"images {wanted[0]} to {wanted[-1]} asked for, of {self.count}")
        return self._take(wanted)[place]

    def _take(self, numbers: np.ndarray) -> np.ndarray:
        return self.pixels.take(numbers) if len(numbers) else np.empty((0, *self.shape), np.uint8)


@dataclass(frozen=True, eq=False)
class ArrayPixels:
    """Images in an array, in memory or mapped from a file."""

    images: np.ndarray
    classes: np.ndarray | None
    any_order: ClassVar[bool] = True

    def take(self, numbers: np.ndarray) -> np.ndarray:
        """See `Pixels.take`."""
        return np.asarray(self.images[numbers])

    def labels(self) -> np.ndarray | None:
        """See `Pixels.labels`."""
        return self.classes


def fingerprint(parts: Mapping[str, object]) -> str:
    """The sha256 (hex) of named parts, whatever their order."""
    text = json.dumps(dict(parts), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def limited(count: int, limit: int | None) -> tuple[int, dict[str, object]]:
    """How many of `count` images a limit leaves, and what it adds to the fingerprint."""
    if limit is None or limit >= count:
        return count, {}
    return limit, {"limit": limit}


def join(parts: Sequence[ImageSet]) -> ImageSet:
    """Data sets one behind the other; their classes are not each other's, so it has none.

    Args:
        parts: one or more; one alone stays what it is.

    Raises:
        UserError: images of different shapes.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    for part in parts[1:]:
        if part.shape != first.shape:
            raise UserError(
                f"data.also: {part.name} has images {part.shape}, but {first.name} has "
                f"{first.shape}; only data sets of one shape can be joined"
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
    def __init__(self, parts: Sequence[ImageSet]) -> None:
        self.parts = parts
        self.any_order = all(part.pixels.any_order for part in parts)
        self.begins = [0, *accumulate(len(part) for part in parts)]

    def take(self, numbers: np.ndarray) -> np.ndarray:
        """See `pipeline.data.image_set.Pixels.take`."""
        places = pairwise(np.searchsorted(numbers, self.begins))
        rows = zip(self.parts, self.begins, places, strict=False)
        return np.concatenate([part.take(numbers[a:b] - begin) for part, begin, (a, b) in rows])

    def labels(self) -> None:
        """See `pipeline.data.image_set.Pixels.labels`."""
        return


_ROWS = 10000


def in_any_order(images: ImageSet, accelerator: Accelerator, progress: Progress) -> ImageSet:
    """The same images, mapped from one array if their own files open only as a whole.

    A batch drawn from all of ImageNet-32 would open its ten files, of 128 000 images each, at
    every step. The array lies under the data root and has 3 072 bytes an image of 3x32x32.

    Args:
        images: any data set.
        accelerator: the processes; the main one writes what is not there.
        progress: wraps the loop.

    Raises:
        JkoflowError: the disk refused, or a file is damaged.
    """
    if images.pixels.any_order:
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
