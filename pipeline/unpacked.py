"""Files of many images as one array, so that batches can be drawn from all of them."""

from __future__ import annotations

import dataclasses
from typing import IO

import numpy as np
from accelerate import Accelerator

from pipeline import assets, commit
from pipeline.agreement import together
from pipeline.image_set import ArrayPixels, ImageSet
from pipeline.latents import Progress

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
    path = assets.data_root() / "pixels" / f"{images.name}-{images.fingerprint[:16]}.npy"

    def fill(file: IO[bytes]) -> None:
        shape = (len(images), *images.shape)
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        starts = range(0, len(images), _ROWS)
        for start in progress(starts, len(starts), "unpack images"):
            file.write(images.read(start, min(start + _ROWS, len(images))).tobytes())

    with together(accelerator):
        if accelerator.is_main_process and not path.is_file():
            commit.sweep(path.parent)
            commit.write_with(path, fill)
    accelerator.wait_for_everyone()
    array = ArrayPixels(np.load(path, mmap_mode="r"), images.labels)
    return dataclasses.replace(images, pixels=array)
