"""Folders of images as a data set of one size and mode."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image, ImageOps

from pipeline.data.file_index import file_records
from pipeline.data.image_set import ImageSet, Pixels, apply_limit, fingerprint
from pipeline.errors import UserError
from pipeline.integrity.pictures import open_picture
from pipeline.integrity.reason import reason_of

ENDINGS = (
    ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm",
)  # fmt: skip
MODES = {"RGB": 3, "L": 1}
_PREPROCESSING = "centre square, bicubic, alpha on white, first frame; 1"
"""Part of the fingerprint; change it whenever `prepare` returns other bytes."""


def load_folder(
    folder: Path, split: str, size: int | None, mode: str, limit: int | None
) -> ImageSet:
    """Open a folder of images at any depth, sorted by their paths in it.

    Subfolders `train` and `test` (or `val`) are the splits; a folder without them is the train
    split. If every image is in a subfolder, the subfolders are the classes. The images get the
    side `size` in pixels and the mode "RGB" or "L".

    Raises:
        UserError: the split does not exist or has no images, or size or mode is invalid.
    """
    check_format(size, mode)
    folder = folder / choose_split(folder, set(splits_of(folder)), split)

    def pixels(names: tuple[str, ...], classes: tuple[str, ...] | None) -> Pixels:
        return FolderPixels(folder, names, classes, size or 0, mode)

    records = partial(file_records, folder)
    names = _list_images(folder)
    return image_set_of_files(folder, names, records, pixels, split, size, mode, limit)


def check_format(size: int | None, mode: str) -> None:
    """Raise UserError unless images can get the side `size` and the mode."""
    if size is None or size < 1:
        given = "null" if size is None else size
        raise UserError(
            f"data.size is {given}; expected 1 or more; set it to the side of the images in pixels"
        )
    if mode not in MODES:
        raise UserError(f"data.mode is {mode!r}; expected one of {', '.join(MODES)}")


def image_set_of_files(
    place: Path | str,
    names: list[str],
    hashes: Callable[[Sequence[str]], list[dict[str, Any]]],
    pixels: Callable[[tuple[str, ...], tuple[str, ...] | None], Pixels],
    split: str,
    size: int | None,
    mode: str,
    limit: int | None,
) -> ImageSet:
    """Return the image set of files, whose first folders are the classes if all are in one.

    Args:
        place: of the files, in messages.
        names: sorted relative paths.
        hashes: names → `size` and `sha256` of each.
        pixels: names and classes → their pixels.
        split: of the images.
        size: side of the images in pixels.
        mode: RGB or L.
        limit: number of images that are used; None uses all.

    Raises:
        UserError: there are no images.
    """
    if not names:
        raise UserError(f"{place} has no images; expected files that end in {' '.join(ENDINGS)}")
    assert size is not None
    classes = _class_names(names)
    count, extra = apply_limit(len(names), limit)
    names = names[:count]
    own = _class_names(names)
    if own is not None and (classes is None or classes[: len(own)] != own):
        extra["classes"] = classes  # images beyond the limit number those within it
    records = hashes(names)
    files = [[n, f["size"], f["sha256"]] for n, f in zip(names, records, strict=True)]
    preprocessing = {"size": size, "mode": mode, "how": _PREPROCESSING}
    return ImageSet(
        name="folder",
        split=split,
        shape=(MODES[mode], size, size),
        fingerprint=fingerprint({"name": "folder", "files": files, **preprocessing, **extra}),
        count=count,
        pixels=pixels(tuple(names), classes),
        class_names=classes,
    )


def read_pictures(paths: Sequence[Path], shape: tuple[int, int, int]) -> np.ndarray:
    """Read image files, and those directly in folders, as uint8 (n, C, H, W) of a shape (C, H, W).

    Raises:
        UserError: a path does not exist or is no image, a folder has none, or H is not W.
    """
    channels, height, width = shape
    if height != width:
        raise UserError(f"images of {height}x{width} are not square; expected square ones")
    files: list[str] = []
    for path in paths:
        path = Path(path).expanduser()
        inside = [path]
        if path.is_dir():
            shown = (p for p in path.iterdir() if not p.name.startswith("."))
            inside = sorted(p for p in shown if p.suffix.lower() in ENDINGS)
        if not inside:
            raise UserError(f"{path} has no images; expected files such as .png or .jpg")
        if not path.exists():
            raise UserError(f"{path} does not exist; expected an image or a folder of images")
        files += [str(file.absolute()) for file in inside]
    mode = "L" if channels == 1 else "RGB"
    return FolderPixels(Path(), tuple(files), None, height, mode).take(np.arange(len(files)))


def splits_of(folder: Path) -> dict[str, Path]:
    """Return the subfolders train, test and val of a folder that exist, by name."""
    return {name: folder / name for name in ("train", "test", "val") if (folder / name).is_dir()}


def choose_split(place: Path | str, splits: set[str], split: str) -> str:
    """Return the folder of a split among those that exist; empty for images without splits.

    Where one of test and val is absent, the other one stands for it.

    Raises:
        UserError: there is none.
    """
    others = {"train": ("train",), "test": ("test", "val"), "val": ("val", "test")}
    for name in others[split]:
        if name in splits:
            return name
    if not splits and split == "train":
        return ""
    if not splits:
        raise UserError(
            f"{place} has no split {split!r}; move the held-out images into {place}/{split}, and "
            f"the others into {place}/train"
        )
    raise UserError(f"{place} has no split {split!r}; put its images into {place}/{split}")


def _list_images(folder: Path) -> list[str]:
    """Return the sorted relative paths of all images below a folder, without hidden files."""
    names = []
    for subfolder, subfolders, files in os.walk(folder, followlinks=True):
        relative = Path(subfolder).relative_to(folder)
        if os.path.islink(subfolder):
            above = [os.path.realpath(folder / parent) for parent in relative.parents]
            inside = f"{os.path.realpath(subfolder)}{os.sep}"
            if any(f"{real}{os.sep}".startswith(inside) for real in above):
                subfolders[:] = []  # a link to a folder on the way to it
                continue
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in files:
            if name.lower().endswith(ENDINGS) and not name.startswith("."):
                if os.path.isfile(os.path.join(subfolder, name)):  # not a FIFO or a device
                    names.append((relative / name).as_posix())
    return sorted(names)


def _class_names(names: list[str]) -> tuple[str, ...] | None:
    """Return the sorted top subfolders; None if an image is in none."""
    if not all("/" in name for name in names):
        return None
    return tuple(sorted({name.split("/")[0] for name in names}))


@dataclass(frozen=True, eq=False)
class FolderPixels:
    """Pixels of a folder of images, decoded on access."""

    folder: Path
    names: tuple[str, ...]
    classes: tuple[str, ...] | None
    size: int
    mode: str
    random_access: ClassVar[bool] = True

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Read images by index, decoded in threads; see `Pixels.take`."""
        paths = [self.folder / self.names[index] for index in indices]
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            return np.stack(list(pool.map(self._read_one, paths)))

    def labels(self) -> np.ndarray | None:
        """Return the index of every image's class, int64 (N,); None without classes."""
        if self.classes is None:
            return None
        indices = {name: index for index, name in enumerate(self.classes)}
        return np.array([indices[name.split("/")[0]] for name in self.names], np.int64)

    def _read_one(self, path: Path) -> np.ndarray:
        """Read an image as uint8 (C, size, size)."""
        try:
            with open_picture(path) as image:
                return prepare(image, self.size, self.mode)
        # Decoders raise many kinds of errors for damaged files.
        except Exception as error:
            raise UserError(
                f"image {path} could not be read ({reason_of(error)}); repair or remove it"
            ) from error


def prepare(image: Image.Image, size: int, mode: str) -> np.ndarray:
    """Convert an image of any mode to uint8 (C, size, size): its centre square, antialiased.

    The EXIF orientation is applied, an animation is reduced to its first frame, transparent parts
    become white, and 16-bit values keep their upper 8 bits.

    Raises:
        ValueError: the image has floating-point pixels, whose range is unknown.
    """
    image = to_8_bit(ImageOps.exif_transpose(image), mode)
    width, height = image.size
    side = min(width, height)
    if (width, height) != (size, size):
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    pixels = np.array(image, np.uint8)
    return pixels[None] if mode == "L" else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def to_8_bit(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image of any mode to 8 bits in mode "RGB" or "L"."""
    if image.mode == "F":
        raise ValueError("it has floating-point pixels; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        upper = np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8
        return Image.fromarray(upper.astype(np.uint8)).convert(mode)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
        return image.convert("RGB").convert(mode)
    # A palette is converted to colours first, so that grey values are those of the colours.
    return (image.convert("RGB") if image.mode in ("P", "CMYK", "LAB") else image).convert(mode)
