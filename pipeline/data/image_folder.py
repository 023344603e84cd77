"""A folder of images as a data set: any sizes and modes in, one size and mode out."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image, ImageOps

from pipeline.data.file_index import file_facts
from pipeline.data.image_set import ImageSet, fingerprint, limited
from pipeline.errors import UserError

ENDINGS = (
    ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm",
)  # fmt: skip
MODES = {"RGB": 3, "L": 1}
_PREPROCESSING = "centre square, bicubic, alpha on white, first frame; 1"
"""Part of the fingerprint: change it whenever `prepare` gives other bytes."""


def load_folder(
    folder: Path, split: str, size: int | None, mode: str, limit: int | None
) -> ImageSet:
    """Open a folder of images, sorted by their paths in it.

    A folder with subfolders `train` and `test` (or `val`) is split by them; any other folder is
    all train. When every image lies in a subfolder, the subfolders are the classes.

    Args:
        folder: where the images lie, at any depth.
        split: "train" or "test".
        size: side of the images, in pixels (>= 1).
        mode: "RGB" or "L" (grey).
        limit: only the first so many.

    Raises:
        UserError: no such split, no images, or a bad size or mode.
    """
    if size is None or size < 1:
        raise UserError(f"data.size is {size}; a folder of images needs a side of 1 pixel or more")
    if mode not in MODES:
        raise UserError(f"data.mode is {mode!r}; choose one of {', '.join(MODES)}")
    folder = _split_folder(folder, split)
    names = _list_images(folder)
    if not names:
        raise UserError(f"no images in {folder}; expected files ending in {' '.join(ENDINGS)}")
    classes = _class_names(names)
    count, extra = limited(len(names), limit)
    names = names[:count]
    facts = file_facts(folder, names)
    files = [[n, f["size"], f["sha256"]] for n, f in zip(names, facts, strict=True)]
    preprocessing = {"size": size, "mode": mode, "how": _PREPROCESSING}
    return ImageSet(
        name="folder",
        split=split,
        shape=(MODES[mode], size, size),
        fingerprint=fingerprint({"name": "folder", "files": files, **preprocessing, **extra}),
        count=count,
        pixels=FolderPixels(folder, tuple(names), classes, size, mode),
        class_names=classes,
    )


def splits_of(folder: Path) -> dict[str, Path]:
    """The subfolders that split a folder, by name: train, test and val; none where it is whole."""
    return {name: folder / name for name in ("train", "test", "val") if (folder / name).is_dir()}


def _split_folder(folder: Path, split: str) -> Path:
    """The folder of a split: a subfolder of its name, or all of a folder without splits."""
    splits = splits_of(folder)
    for name in ("train",) if split == "train" else ("test", "val"):
        if name in splits:
            return splits[name]
    if not splits and split == "train":
        return folder
    if not splits:
        raise UserError(
            f"{folder} has no split {split!r}; move the images that are held out into "
            f"{folder / split}, and the others into {folder / 'train'}"
        )
    raise UserError(f"{folder} has no split {split!r}; put its images into {folder / split}")


def _list_images(folder: Path) -> list[str]:
    """Paths of all images below `folder`, relative and sorted; hidden files do not count."""
    names = []
    seen = set()
    for place, subfolders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link back up
            subfolders[:] = []
            continue
        seen.add(real)
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        inside = Path(place).relative_to(folder)
        for name in files:
            if name.lower().endswith(ENDINGS) and not name.startswith("."):
                names.append((inside / name).as_posix())
    return sorted(names)


def _class_names(names: list[str]) -> tuple[str, ...] | None:
    """The top subfolders, sorted; None if an image lies in none."""
    if not all("/" in name for name in names):
        return None
    return tuple(sorted({_top(name) for name in names}))


def _top(name: str) -> str:
    return name.split("/", 1)[0]


@dataclass(frozen=True, eq=False)
class FolderPixels:
    """The images of a folder, decoded when they are asked for."""

    folder: Path
    names: tuple[str, ...]
    classes: tuple[str, ...] | None
    size: int
    mode: str
    any_order: ClassVar[bool] = True

    def take(self, numbers: np.ndarray) -> np.ndarray:
        """See `pipeline.data.image_set.Pixels.take`; decodes in threads."""
        paths = [self.folder / self.names[number] for number in numbers]
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            return np.stack(list(pool.map(self._read_one, paths)))

    def labels(self) -> np.ndarray | None:
        """See `Pixels.labels`: the number of each image's class by name."""
        if self.classes is None:
            return None
        numbers = {name: number for number, name in enumerate(self.classes)}
        return np.array([numbers[_top(name)] for name in self.names], np.int64)

    def _read_one(self, path: Path) -> np.ndarray:
        try:
            with Image.open(path) as image:
                return prepare(image, self.size, self.mode)
        # Decoders of damaged files fail in every way there is.
        except Exception as error:
            raise UserError(
                f"could not read the image {path} ({error}); repair it or take it away"
            ) from error


def prepare(image: Image.Image, size: int, mode: str) -> np.ndarray:
    """An image as uint8 (C, size, size): its centre square, resized with antialiasing.

    The camera's orientation is applied; of an animation the first frame is taken; transparent
    parts become white; 16-bit values keep their upper 8 bits.

    Args:
        image: an opened image of any mode and size.
        size: side of the result.
        mode: "RGB" or "L".

    Raises:
        ValueError: floating-point pixels, whose range nothing tells.
    """
    image = _to_8_bit(ImageOps.exif_transpose(image), mode)
    width, height = image.size
    side = min(width, height)
    if (width, height) != (size, size):
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    pixels = np.array(image, np.uint8)
    return pixels[None] if mode == "L" else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _to_8_bit(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        upper = np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8
        return Image.fromarray(upper.astype(np.uint8)).convert(mode)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
        return image.convert("RGB").convert(mode)
    # Palettes go through their colours, so that grey is the grey of what is seen.
    return (image.convert("RGB") if image.mode in ("P", "CMYK") else image).convert(mode)
