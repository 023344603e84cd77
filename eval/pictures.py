"""Grids of images and animations, by Pillow alone; what needs axes is in `eval.plots`.

Every function that writes takes a path or a binary file open for writing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

#: key of the text inside a PNG
_NOTE = "jkoflow"

Target = str | Path | IO[bytes]
Images = Tensor | npt.NDArray[np.uint8]


def grid(
    images: Images, columns: int | None = None, *, padding: int = 2, scale: int = 1
) -> Image.Image:
    """Lay images out in rows on white.

    Args:
        images: uint8 (N, C, H, W), N ≥ 1, C = 1 or 3.
        columns: images a row; about √N by default.
        padding: pixels between and around the images, before scaling.
        scale: whole factor by which every pixel is enlarged.

    Returns:
        A picture of mode L or RGB.

    Raises:
        ValueError: another type or shape, or columns, padding or scale out of range.
    """
    pixels = images.detach().cpu().numpy() if isinstance(images, Tensor) else np.asarray(images)
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or not len(pixels):
        raise ValueError(f"expected uint8 images (N, C, H, W), found {pixels.dtype} "
                         f"{pixels.shape}")  # fmt: skip
    n, channels, height, width = pixels.shape
    if channels not in (1, 3):
        raise ValueError(f"a grid shows images of 1 or 3 channels, found {channels}")
    columns = math.ceil(math.sqrt(n)) if columns is None else columns
    if columns < 1 or padding < 0 or scale < 1:
        raise ValueError(f"a grid needs columns ≥ 1, padding ≥ 0 and scale ≥ 1, found "
                         f"{columns}, {padding}, {scale}")  # fmt: skip
    columns = min(columns, n)
    step_y, step_x = height + padding, width + padding
    canvas = np.full(
        (math.ceil(n / columns) * step_y + padding, columns * step_x + padding, channels),
        255, np.uint8,
    )  # fmt: skip
    for i, image in enumerate(pixels):
        top, left = (i // columns) * step_y + padding, (i % columns) * step_x + padding
        canvas[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    canvas = canvas.repeat(scale, 0).repeat(scale, 1)
    return Image.fromarray(canvas[:, :, 0] if channels == 1 else canvas)


def save_png(image: Image.Image, file: Target, note: str | None = None) -> None:
    """Write a picture as PNG, with a note inside it that viewers pass over."""
    info = None
    if note is not None:
        info = PngInfo()
        info.add_text(_NOTE, note)
    image.save(file, format="PNG", optimize=True, pnginfo=info)


def note_of(path: str | Path) -> str | None:
    """The note inside a picture; None if there is none, or no picture."""
    try:
        with Image.open(path) as image:
            note = image.info.get(_NOTE)
    except OSError:
        return None
    return note if isinstance(note, str) else None


def side_by_side(pictures: Sequence[Image.Image], gap: int = 12) -> Image.Image:
    """Put pictures next to each other on white, tops aligned."""
    if not pictures:
        raise ValueError("no pictures to put side by side")
    mode = "L" if all(p.mode == "L" for p in pictures) else "RGB"
    width = sum(p.width for p in pictures) + gap * (len(pictures) - 1)
    canvas = Image.new(mode, (width, max(p.height for p in pictures)), "white")
    left = 0
    for picture in pictures:
        canvas.paste(picture.convert(mode), (left, 0))
        left += picture.width + gap
    return canvas


def animation(
    file: Target, frames: Sequence[Image.Image], *, seconds: float = 0.25, hold: float = 1.5
) -> None:
    """Write frames of one size as an endless GIF that rests on its last frame.

    Args:
        file: where the GIF goes.
        frames: two or more pictures of one size.
        seconds: each frame's time, ≥ 0.02.
        hold: the last frame's time.

    Raises:
        ValueError: fewer than two frames, different sizes, or a time too short.
    """
    if len(frames) < 2 or len({f.size for f in frames}) != 1:
        raise ValueError("an animation needs two or more frames of one size")
    if min(seconds, hold) < 0.02:
        raise ValueError(f"a frame lasts 0.02 seconds or more, found {min(seconds, hold)}")
    durations = [round(1000 * seconds)] * (len(frames) - 1) + [round(1000 * hold)]
    first, *rest = [f if f.mode == "L" else f.convert("RGB") for f in frames]
    first.save(file, format="GIF", save_all=True, append_images=rest, duration=durations, loop=0)
