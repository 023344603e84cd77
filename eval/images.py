"""Sets of images on disk, read as pytorch-fid reads them, fast enough for the network.

A set is a folder of pictures or an .npz with `arr_0`, uint8 (N, H, W, C). Both are streamed
by threads that stay a few batches ahead.
"""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from eval.gaussian import GaussianStats
from eval.inception import FEATURES, FidInception
from eval.references import available, is_reference, load_reference, read_reference

EXTENSIONS = {".bmp", ".jpg", ".jpeg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
"""pytorch-fid's, here in either case."""

Batch = Tensor | list[Tensor]
"""uint8 (B, C, H, W); a list of (C, H, W) where the images of a batch differ in size."""

Progress = Callable[[int], None]
"""Called after each batch with the number of images in it."""

Job = TypeVar("Job")

_BATCH = 50
_AHEAD = 3


class FolderImages:
    """The pictures that lie in a folder (not below it), in the order of their names.

    Args:
        folder: where they lie; any sizes and modes. Colour is read as RGB, without alpha.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds fewer than two images.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder of images at {folder}; check the path")
        self.files = sorted(
            p for p in folder.iterdir() if p.suffix.lower() in EXTENSIONS and p.is_file()
        )
        _enough(len(self.files), folder)

    def __len__(self) -> int:
        return len(self.files)

    def batches(self, size: int = _BATCH) -> Iterator[Batch]:
        """Yield the images in order, `size` at a time.

        Raises:
            ValueError: an image cannot be read; the sentence names it.
        """
        chunks = (self.files[i : i + size] for i in range(0, len(self.files), size))
        yield from _ahead(chunks, _read_pictures, min(4, os.cpu_count() or 1))


class NpzImages:
    """The images of an .npz with `arr_0`, uint8 (N, H, W, 1 or 3), never all in memory.

    Args:
        path: the file, compressed or not.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a file, or holds fewer than two images.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with _archive(self.path) as archive:
            if "arr_0.npy" not in archive.namelist():
                raise ValueError(f"{self.path} holds no `arr_0`; expected an .npz of images")
            with archive.open("arr_0.npy") as file:
                self.shape = self._header(file)
        _enough(self.shape[0], self.path)

    def _header(self, file: IO[bytes]) -> tuple[int, ...]:
        """Read past the header of `arr_0`, checking it."""
        try:
            version = np.lib.format.read_magic(file)
            read = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, fortran, dtype = read(file)
        except (ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            raise ValueError(f"{self.path} is damaged: `arr_0` is no array") from error
        if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or fortran:
            raise ValueError(
                f"{self.path}: expected `arr_0` uint8 (N, H, W, 1 or 3) in C order, found "
                f"{dtype} {shape}{' in Fortran order' if fortran else ''}"
            )
        return tuple(shape)

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, size: int = _BATCH) -> Iterator[Batch]:
        """Yield the images in order, `size` at a time.

        Raises:
            ValueError: the file ends early or is damaged.
        """
        count, height, width, channels = self.shape
        with _archive(self.path) as archive, archive.open("arr_0.npy") as file:
            self._header(file)

            def read(rows: int) -> Tensor:
                want = rows * height * width * channels
                try:
                    raw = file.read(want)
                except (EOFError, OSError, zlib.error, zipfile.BadZipFile) as error:
                    raise ValueError(f"{self.path} is damaged; make it again") from error
                if len(raw) != want:
                    raise ValueError(f"{self.path} ends before its {count} images do")
                images = np.frombuffer(raw, np.uint8).reshape(rows, height, width, channels)
                return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())

            rows = (min(size, count - i) for i in range(0, count, size))
            # One thread: a compressed stream can only be read front to back.
            yield from _ahead(rows, read, 1)


def open_images(path: str | Path) -> FolderImages | NpzImages:
    """Open a set of images, a folder or an .npz.

    Raises:
        FileNotFoundError: nothing lies there.
        ValueError: it is no such set.
    """
    path = Path(path)
    if path.is_dir():
        return FolderImages(path)
    if path.suffix != ".npz" and path.is_file():
        raise ValueError(f"{path} is neither a folder of images nor an .npz")
    return NpzImages(path)


def compute_features(
    images: FolderImages | NpzImages, network: FidInception, progress: Progress | None = None
) -> Tensor:
    """Return the features (N, 2048) of all images, float32 on the CPU, in order."""
    out = torch.empty(len(images), FEATURES)
    done = 0
    for batch in images.batches():
        out[done : done + len(batch)] = network.features(batch).cpu()
        done += len(batch)
        if progress:
            progress(len(batch))
    return out


def compute_stats(
    images: FolderImages | NpzImages, network: FidInception, progress: Progress | None = None
) -> GaussianStats:
    """Accumulate the statistics of all images, a batch in memory at a time."""
    stats = GaussianStats(FEATURES)
    for batch in images.batches():
        stats.update(network.features(batch))
        if progress:
            progress(len(batch))
    return stats


def stats_of(
    where: str | Path, network: Callable[[], FidInception], progress: Progress | None = None
) -> GaussianStats:
    """Statistics of whatever `jkoflow fid` accepts.

    Args:
        where: a folder of images, an .npz of images (`arr_0`) or of statistics (`mu`,
            `sigma`), a .safetensors that `jkoflow reference` wrote, or, where no such path
            exists, the name of a shipped reference.
        network: makes the network; only called when there are images to look at.
        progress: called after each batch.

    Raises:
        FileNotFoundError: neither a path nor a reference.
        ValueError: the set is empty, too small, damaged or of another kind.
    """
    path = Path(where)
    if not path.exists():
        if str(where) in available():
            return load_reference(str(where)).stats
        raise FileNotFoundError(
            f"'{where}' is neither a path nor a shipped reference "
            f"({', '.join(available()) or 'none are shipped'})"
        )
    if is_reference(path):
        return _of_pool3(path, read_reference(path).stats)
    if path.is_file() and path.suffix == ".npz":
        with _archive(path) as archive:
            names = set(archive.namelist())
        if {"mu.npy", "sigma.npy"} <= names:
            return _of_pool3(path, GaussianStats.load(path))
        if "arr_0.npy" not in names:
            raise ValueError(
                f"{path} holds neither images (`arr_0`) nor statistics (`mu`, `sigma`)"
            )
    return compute_stats(open_images(path), network(), progress)


def _of_pool3(path: Path, stats: GaussianStats) -> GaussianStats:
    """Statistics that can be compared with."""
    if stats.dim != FEATURES:
        raise ValueError(
            f"{path}: expected statistics of {FEATURES} features, found {stats.dim}; use pool3 "
            "features"
        )
    return stats


def _archive(path: Path) -> zipfile.ZipFile:
    if not path.is_file():
        raise FileNotFoundError(f"no .npz at {path}; check the path")
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{path} is not an .npz, or is damaged; make it again") from error
    return archive


def _enough(n: int, where: Path) -> None:
    if n < 2:
        found = "none" if n == 0 else "one"
        raise ValueError(f"{where}: a distance needs at least 2 images, found {found}")


def _read_pictures(files: list[Path]) -> Batch:
    images = [_read_picture(file) for file in files]
    same = all(image.shape == images[0].shape for image in images)
    return torch.stack(images) if same else images


def _read_picture(file: Path) -> Tensor:
    """Read one picture as uint8 (C, H, W): grey stays one channel, all else becomes RGB."""
    try:
        with Image.open(file) as picture:
            pixels = np.array(picture if picture.mode == "L" else picture.convert("RGB"))
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error,
            Image.DecompressionBombError) as error:  # fmt: skip
        raise ValueError(f"cannot read the image {file} ({error}); remove or repair it") from error
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(pixels))


def _ahead(jobs: Iterator[Job], read: Callable[[Job], Batch], threads: int) -> Iterator[Batch]:
    """Yield read(job) in order, keeping some reads ahead of the consumer."""
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
