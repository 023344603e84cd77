"""Grids of images, plots and animations, drawn without touching matplotlib's global state.

Every function that writes takes a path or a binary file open for writing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

#: key of the text inside a PNG
_NOTE = "jkoflow"

Target = str | Path | IO[bytes]
Images = Tensor | npt.NDArray[np.uint8]

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
_LIGHT, _DARK = np.array([0.68, 0.80, 0.90]), np.array([0.03, 0.25, 0.47])


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


def before_after(
    file: Target,
    before: Images,
    after: Images,
    *,
    columns: int | None = None,
    titles: tuple[str, str] = ("before", "after"),
) -> None:
    """Write two grids of the same images side by side, each under its title.

    Args:
        file: where the PNG goes.
        before: uint8 (N, C, H, W), such as originals.
        after: the same shape, such as reconstructions.
        columns: images a row.
        titles: printed above the grids.

    Raises:
        ValueError: the shapes differ, or are no images.
    """
    if tuple(before.shape) != tuple(after.shape):
        raise ValueError(
            f"expected two sets of one shape, found {tuple(before.shape)}, {tuple(after.shape)}"
        )
    pictures = [grid(images, columns, scale=2) for images in (before, after)]
    height, width = pictures[0].height / 100, pictures[0].width / 100
    figure = _figure(2 * width + 0.5, height + 0.5)
    for i, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
        left = (i * (width + 0.3) + 0.1) / (2 * width + 0.5)
        axes = figure.add_axes(
            (left, 0.1 / (height + 0.5), width / (2 * width + 0.5), height / (height + 0.5))
        )
        axes.imshow(np.asarray(picture), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_title(title, fontsize=9)
        axes.axis("off")
    _save(figure, file, tight=False)


def movement_bars(
    file: Target,
    movements: Sequence[Sequence[float]],
    labels: Sequence[str] | None = None,
    *,
    title: str = "Movement of each block",
) -> None:
    """Draw the W2 movement S_k of every block, one group of bars a block.

    Args:
        file: where the PNG goes.
        movements: one list per training pass (they may differ in length), each S_1 … S_K.
        labels: names of the passes, such as `iter 1`; later passes are darker.
        title: above the plot.

    Raises:
        ValueError: no movement, or labels that do not match.
    """
    if not movements or not all(len(m) for m in movements):
        raise ValueError("movement_bars needs the movement of at least one block in each pass")
    labels = [f"iter {i + 1}" for i in range(len(movements))] if labels is None else labels
    if len(labels) != len(movements):
        raise ValueError(f"{len(movements)} passes of movements but {len(labels)} labels")
    passes, blocks = len(movements), max(len(m) for m in movements)
    figure = _figure(max(4.5, 1.2 + 0.3 * blocks * max(passes, 2)), 3.2)
    axes = _axes(figure, "block", r"movement $S_k$", title)
    width = 0.8 / passes
    for i, (values, label) in enumerate(zip(movements, labels, strict=True)):
        shade = _DARK if passes == 1 else _LIGHT + (_DARK - _LIGHT) * i / (passes - 1)
        x = np.arange(1, len(values) + 1) + (i - (passes - 1) / 2) * width
        axes.bar(x, values, 0.92 * width, color=tuple(shade), label=label)
    axes.set_xticks(range(1, blocks + 1))
    axes.set_ylim(bottom=0)
    if passes > 1:
        _legend(axes)
    _save(figure, file)


def curves(
    file: Target,
    lines: Mapping[str, tuple[npt.ArrayLike, npt.ArrayLike]],
    *,
    x_label: str,
    y_label: str,
    title: str = "",
    log_y: bool = False,
    marks: Mapping[str, float] | None = None,
) -> None:
    """Draw named lines over one axis.

    Args:
        file: where the PNG goes.
        lines: name to (x, y), each (n,); numbers that are not finite leave a gap.
        x_label: under the axis.
        y_label: beside the axis.
        title: above the plot.
        log_y: logarithmic y axis; all y above 0.
        marks: named heights, drawn as dashed lines (a floor, a threshold).

    Raises:
        ValueError: no line, or an x and y of different lengths.
    """
    if not lines:
        raise ValueError("curves needs at least one line")
    figure = _figure(5.4, 3.4)
    axes = _axes(figure, x_label, y_label, title)
    for i, (name, (x, y)) in enumerate(lines.items()):
        xs, ys = np.asarray(x, float), np.asarray(y, float)
        if xs.shape != ys.shape or xs.ndim != 1:
            raise ValueError(f"line '{name}' has x {xs.shape} and y {ys.shape}; expected (n,)")
        few = "o" if len(xs) <= 20 else None
        axes.plot(xs, ys, marker=few, markersize=4, lw=1.6, label=name, color=_COLOURS[i % 7])
    for name, height in (marks or {}).items():
        axes.axhline(height, ls="--", lw=1, color="#777777", label=name)
    if log_y:
        axes.set_yscale("log")
    if all(np.allclose(np.asarray(x, float) % 1, 0) for x, _ in lines.values()):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if marks or len(lines) > 1:
        _legend(axes)
    _save(figure, file)


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


def _figure(width: float, height: float) -> Figure:
    """Make a figure of the given inches with its own Agg canvas, outside of pyplot."""
    figure = Figure(figsize=(width, height), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _axes(figure: Figure, x_label: str, y_label: str, title: str) -> Axes:
    axes = figure.add_subplot()
    axes.set_xlabel(x_label, fontsize=9)
    axes.set_ylabel(y_label, fontsize=9)
    axes.set_title(title, fontsize=10, loc="left")
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e5e5", lw=0.8)
    axes.set_axisbelow(True)
    return axes


def _legend(axes: Axes) -> None:
    axes.legend(fontsize=8, frameon=False)


def _save(figure: Figure, file: Target, tight: bool = True) -> None:
    options: dict[str, Any] = {"bbox_inches": "tight"} if tight else {}
    figure.savefig(file, format="png", dpi=150, **options)
