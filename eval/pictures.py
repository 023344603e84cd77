"""Image grids and animations, without matplotlib; figures with axes are in `eval.plots`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from pipeline.integrity.pictures import open_picture

#: key of the text chunk inside a PNG
_NOTE = "jkoflow"
_WHITE, _PADDING = 255, 2

#: a path, or a binary file open for writing
Target = str | Path | IO[bytes]
Images = Tensor | npt.NDArray[np.uint8]


def image_grid(images: Images, columns: int | None = None, *, scale: int = 1) -> Image.Image:
    """Lay images, uint8 (N, C, H, W), C = 1 or 3, out on white with torchvision's `make_grid`.

    There are ⌈√N⌉ columns by default. `scale` enlarges every pixel.

    Raises:
        ValueError: another dtype or shape.
    """
    from torchvision.utils import make_grid  # takes seconds to import

    if isinstance(images, Tensor):
        pixels = images.detach().cpu()
    else:
        pixels = torch.from_numpy(np.array(images, order="C"))
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or not len(pixels):
        raise ValueError(
            f"the images are {pixels.dtype} {tuple(pixels.shape)}; expected uint8 (N, C, H, W) "
            "with N ≥ 1"
        )
    n, channels = pixels.shape[:2]
    if channels not in (1, 3):
        raise ValueError(f"the images have {channels} channels; expected 1 or 3")
    columns = columns or math.ceil(math.sqrt(n))
    if n == 1:  # `make_grid` returns a single image without its padding
        canvas = F.pad(pixels[0], [_PADDING] * 4, value=_WHITE)
    else:
        canvas = make_grid(pixels, nrow=columns, padding=_PADDING, pad_value=_WHITE)[:channels]
    array = canvas.permute(1, 2, 0).numpy().repeat(scale, 0).repeat(scale, 1)
    return Image.fromarray(array[:, :, 0] if channels == 1 else array)


def save_png(image: Image.Image, file: Target, note: str | None = None) -> None:
    """Write a picture as PNG, with an optional note in its metadata."""
    info = None
    if note is not None:
        info = PngInfo()
        info.add_text(_NOTE, note)
    image.save(file, format="PNG", optimize=True, pnginfo=info)


def note_of(path: str | Path) -> str | None:
    """Read the note in a PNG's metadata; None without a note or a readable picture."""
    try:
        with open_picture(path) as image:
            note = image.info.get(_NOTE)
    except (OSError, ValueError):
        return None
    return note if isinstance(note, str) else None


def animation(
    file: Target, frames: Sequence[Image.Image], *, seconds: float = 0.25, hold: float = 1.5
) -> None:
    """Write frames as an endless GIF that pauses on its last frame for `hold` seconds.

    Raises:
        ValueError: fewer than two frames, or different sizes.
    """
    if len(frames) < 2 or len({f.size for f in frames}) != 1:
        raise ValueError(
            f"the animation has {len(frames)} frames of {len({f.size for f in frames})} sizes; "
            "expected two or more frames of one size"
        )
    durations = [round(1000 * seconds)] * (len(frames) - 1) + [round(1000 * hold)]
    first, *rest = [f if f.mode == "L" else f.convert("RGB") for f in frames]
    first.save(file, format="GIF", save_all=True, append_images=rest, duration=durations, loop=0)
