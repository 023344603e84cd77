"""Image sets on disk, with the same pixels as pytorch-fid reads: folders and .npz files.

Threads read a few batches ahead of the network.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import IO, Protocol, TypeVar

import numpy as np
import torch
from PIL import UnidentifiedImageError
from torch import Tensor

from pipeline.integrity.arrays import read_header
from pipeline.integrity.limits import require_size
from pipeline.integrity.pictures import DAMAGE, open_picture
from pipeline.integrity.reason import reason_of

EXTENSIONS = {".bmp", ".jpg", ".jpeg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
"""pytorch-fid's extensions, here in upper and lower case."""

Batch = Tensor | list[Tensor]
"""Images uint8 (B, C, H, W), or a list of (C, H, W) if their sizes differ."""

Job = TypeVar("Job")

#: errors of a damaged or encrypted archive
_DAMAGE = (ValueError, EOFError, OSError, RuntimeError, NotImplementedError, zlib.error,
           zipfile.BadZipFile)  # fmt: skip
BATCH = 50
_AHEAD = 3


class ImageSource(Protocol):
    """Set of images, at least two, in a fixed order."""

    def __len__(self) -> int: ...

    def batches(self, size: int = BATCH) -> Iterator[Batch]:
        """Yield the images in order, `size` at a time; a ValueError names a damaged one."""
        ...


class FolderImages:
    """Image files of a folder (without its subfolders), in the order of their names.

    Colour is read as RGB, without alpha.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: it holds fewer than two images.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder of images at {folder}; check the path")
        self.files = self.list_files(folder)
        require_two(len(self.files), folder)

    @staticmethod
    def list_files(folder: Path) -> list[Path]:
        """List the image files of a folder by their names."""
        return sorted(
            p for p in folder.iterdir() if p.suffix.lower() in EXTENSIONS and p.is_file()
        )

    def __len__(self) -> int:
        return len(self.files)

    def batches(self, size: int = BATCH) -> Iterator[Batch]:
        """Yield the images in order, `size` at a time; a ValueError names a damaged one."""
        chunks = (self.files[i : i + size] for i in range(0, len(self.files), size))
        yield from read_ahead(chunks, _read_pictures, min(4, os.cpu_count() or 1))


class NpzImages:
    """Images of an .npz with `arr_0`, uint8 (N, H, W, 1 or 3), read batch by batch.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not such a file, or holds fewer than two images.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with open_archive(self.path) as archive:
            if "arr_0.npy" not in archive.namelist():
                raise ValueError(
                    f"{self.path} has no array `arr_0`; expected an .npz of images, `arr_0` uint8 "
                    "(N, H, W, 1 or 3)"
                )
            self.shape = self._read_header(archive)
        require_two(self.shape[0], self.path)

    def _read_header(self, archive: zipfile.ZipFile) -> tuple[int, ...]:
        """Return the shape (N, H, W, C) of `arr_0`."""
        try:
            file = archive.open("arr_0.npy")
        except _DAMAGE as error:
            raise ValueError(
                f"{self.path} is damaged or encrypted ({reason_of(error)}); write it again"
            ) from error
        with file:
            return self._header(file)

    def _header(self, file: IO[bytes]) -> tuple[int, ...]:
        """Read and check the header of `arr_0`; return its shape (N, H, W, C)."""
        try:
            shape, fortran, dtype = read_header(file)
        except _DAMAGE as error:
            raise ValueError(
                f"{self.path} is damaged: `arr_0` is no array; write it again"
            ) from error
        if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or fortran or 0 in shape:
            raise ValueError(
                f"`arr_0` of {self.path} is {dtype} {shape}"
                f"{' in Fortran order' if fortran else ''}; expected uint8 (N, H, W, 1 or 3) in "
                "C order"
            )
        return tuple(shape)

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, size: int = BATCH) -> Iterator[Batch]:
        """Yield the images in order, `size` at a time; ValueError if the file is damaged."""
        count, height, width, channels = self.shape
        with open_archive(self.path) as archive, archive.open("arr_0.npy") as file:
            self._header(file)

            def read(rows: int) -> Tensor:
                expected = rows * height * width * channels
                require_size(expected, f"a batch of {self.path}")
                try:
                    raw = file.read(expected)
                except _DAMAGE as error:
                    raise ValueError(f"{self.path} is damaged; write it again") from error
                if len(raw) != expected:
                    raise ValueError(
                        f"{self.path} ends before the last of its {count} images; write it again"
                    )
                images = np.frombuffer(raw, np.uint8).reshape(rows, height, width, channels)
                return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())

            rows = (min(size, count - i) for i in range(0, count, size))
            # A compressed stream can only be read front to back, so there is one thread.
            yield from read_ahead(rows, read, 1)


def open_archive(path: Path) -> zipfile.ZipFile:
    """Open an .npz."""
    if not path.is_file():
        raise FileNotFoundError(f"no .npz at {path}; check the path")
    try:
        archive = zipfile.ZipFile(path)
    except _DAMAGE as error:  # UnicodeDecodeError, too, whose sentence names no file
        raise ValueError(f"{path} is not an .npz, or is damaged; write it again") from error
    return archive


def require_two(n: int, path: Path) -> None:
    """Raise ValueError unless there are two images or more."""
    if n < 2:
        raise ValueError(f"{path} holds {n} images; expected at least 2 for a distance")


def _read_pictures(files: list[Path]) -> Batch:
    """Read a batch of image files."""
    return stack_batch([_read_picture(file) for file in files])


def _read_picture(file: Path) -> Tensor:
    """Read an image file as uint8 (C, H, W); grey keeps one channel, all others become RGB."""
    return decode_picture(file, f"the image {file}")


def decode_picture(file: Path | BytesIO, name: str) -> Tensor:
    """Decode an image as uint8 (C, H, W); grey keeps one channel, all others become RGB.

    Raises:
        ValueError: it cannot be decoded; `name` stands for it in the message.
    """
    try:
        with open_picture(file) as picture:
            pixels = np.array(picture if picture.mode == "L" else picture.convert("RGB"))
    except DAMAGE as error:
        reason = "it is no image" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"cannot read {name} ({reason}); remove or repair it") from error
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(pixels))


def stack_batch(images: list[Tensor]) -> Batch:
    """Stack images (C, H, W) of one shape; leave others a list."""
    same = all(image.shape == images[0].shape for image in images)
    return torch.stack(images) if same else images


def read_ahead(jobs: Iterator[Job], read: Callable[[Job], Batch], threads: int) -> Iterator[Batch]:
    """Yield read(job) in order, while threads read a few jobs ahead of the consumer."""
    pool = ThreadPoolExecutor(threads)
    waiting: deque[Future[Batch]] = deque()
    try:
        for job in jobs:
            waiting.append(pool.submit(read, job))
            if len(waiting) > _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
