"""Files of sampled images: a grid, an archive, a folder of PNGs."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from eval.pictures import animation, image_grid, save_png
from pipeline.errors import UserError
from pipeline.runs.run import Run
from pipeline.runtime.console import say
from pipeline.runtime.system import require_disk_space
from pipeline.storage import atomic
from pipeline.storage.lock import locked
from pipeline.storage.shards.reader import StoreReader

_NAME = "{:06d}.png"
#: bytes that the smallest file takes on most disks
_DISK_BLOCK = 4096
_BATCH = 500


def batches(images: StoreReader) -> Iterator[Tensor]:
    """Yield the images of a store in order, in batches uint8 (B, C, H, W)."""
    for start in range(0, len(images), _BATCH):
        yield images.read("images", start, min(start + _BATCH, len(images)))


def write_grid(
    images: StoreReader, path: Path, count: int, columns: int, classes: int = 1
) -> None:
    """Write the first `count` images of a store, or fewer, as one PNG grid.

    If the images have several classes in turn, each class has its own row.

    Raises:
        UserError: columns is below 1.
    """
    if columns < 1:
        raise UserError(f"generate.columns must be at least 1, not {columns}")
    rows = classes > 1 and len(images) >= classes
    if rows:
        columns = min(columns, len(images) // classes)
        count = classes * columns
    first = images.read("images", 0, min(count, len(images)))
    if rows:
        first = first.unflatten(0, (columns, classes)).transpose(0, 1).flatten(0, 1)
    picture = image_grid(first, min(columns, len(first)), scale=_scale(first))
    note = json.dumps(images.manifest["identity"], sort_keys=True)
    atomic.write_with(path, lambda file: save_png(picture, file, note))


def write_strip(columns: Sequence[Tensor], path: Path, note: dict[str, Any]) -> None:
    """Write a PNG with one row per image; each column is uint8 (n, C, H, W)."""
    images = torch.stack(list(columns), 1).flatten(0, 1)
    picture = image_grid(images, len(columns), scale=_scale(images))
    text = json.dumps(note, sort_keys=True)
    atomic.write_with(path, lambda file: save_png(picture, file, text))


def write_animation(frames: Sequence[Tensor], path: Path) -> None:
    """Write an endless GIF; each frame is a grid of images uint8 (n, C, H, W)."""
    pictures = [image_grid(frame, scale=_scale(frame)) for frame in frames]
    atomic.write_with(path, lambda file: animation(file, pictures))


def _scale(images: Tensor) -> int:
    """Return how much pixels of images (…, W) are enlarged."""
    return 2 if images.shape[-1] <= 64 else 1


def require_outputs(run: Run, n: int, folder: Path | None, npz: Path | None) -> None:
    """Refuse outputs that could not be written, before any of n images is sampled.

    The folder and the npz are those of :func:`write_folder` and :func:`write_npz`.

    Raises:
        UserError: the folder holds other files, or a disk is too small.
    """
    size = math.prod(run.manifest.require_autoencoder().image_shape)
    if folder is not None:
        written = _count_written(folder, n)
        require_disk_space(folder, (n - written) * max(size, _DISK_BLOCK), f"{n} pictures")
    if npz is not None:
        require_disk_space(npz.parent, n * size, f"{n} images in one archive")


def write_npz(images: StoreReader, path: Path) -> None:
    """Write all images as `arr_0`, uint8 (N, H, W, C), the layout that FID tools read."""
    count, channels, height, width = (len(images), *images.read("images", 0, 1).shape[1:])
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, height, width, channels)}

    def write(file: IO[bytes]) -> None:
        with (
            zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive,
            archive.open("arr_0.npy", "w", force_zip64=True) as member,
        ):
            np.lib.format.write_array_header_1_0(member, header)
            for batch in batches(images):
                member.write(batch.permute(0, 2, 3, 1).contiguous().numpy().tobytes())

    atomic.write_with(path, write)


def write_folder(images: StoreReader, folder: Path) -> None:
    """Write every image as a PNG of its own: `000000.png`, `000001.png` and so on.

    Another process that writes the folder is waited for.

    Raises:
        UserError: the folder holds other files.
    """
    index = 0
    with locked(folder, "the folder of images", say):
        _count_written(folder, len(images))
        for batch in batches(images):
            for image in batch.permute(0, 2, 3, 1).numpy():
                picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
                path = folder / _NAME.format(index)
                atomic.write_with(path, partial(picture.save, format="PNG"))
                index += 1


def _count_written(folder: Path, n: int) -> int:
    """Count the PNGs of n images that exist; refuse a folder with any other file."""
    if not folder.is_dir():
        return 0
    atomic.remove_temporaries(folder)  # of a killed process
    names = [path.name for path in folder.iterdir()]
    for name in names:
        stem = name.removesuffix(".png")
        if not (stem.isdecimal() and int(stem) < n and name == _NAME.format(int(stem))):
            raise UserError(f"{folder} holds other files; choose an empty folder for the images")
    return len(names)
