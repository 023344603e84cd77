"""Plots of images, movements and curves, drawn without matplotlib's global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from eval.pictures import Images, Target, image_grid

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
_LIGHT, _DARK = np.array([0.68, 0.80, 0.90]), np.array([0.03, 0.25, 0.47])


def before_after(
    file: Target,
    before: Images,
    after: Images,
    *,
    columns: int | None = None,
    titles: tuple[str, str],
) -> None:
    """Write two image grids, uint8 (N, C, H, W), next to each other, each under its title.

    Raises:
        ValueError: the shapes differ, or are not those of images.
    """
    if tuple(before.shape) != tuple(after.shape):
        raise ValueError(
            f"the sets have the shapes {tuple(before.shape)} and {tuple(after.shape)}; expected "
            "one shape"
        )
    pictures = [image_grid(images, columns, scale=2) for images in (before, after)]
    height, width = pictures[0].height / 100, pictures[0].width / 100
    figure = new_figure(2 * width + 0.5, height + 0.5)
    for i, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
        left = (i * (width + 0.3) + 0.1) / (2 * width + 0.5)
        axes = figure.add_axes(
            (left, 0.1 / (height + 0.5), width / (2 * width + 0.5), height / (height + 0.5))
        )
        axes.imshow(np.asarray(picture), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_title(title, fontsize=9)
        axes.axis("off")
    save_figure(figure, file, tight=False)


def strips(file: Target, rows: Mapping[str, Images]) -> None:
    """Write images, uint8 (N, C, H, W), in one row for each title, which stands above it.

    Raises:
        ValueError: there is no row, or a set is empty or no set of images.
    """
    if not rows:
        raise ValueError("there are 0 rows; expected at least one")
    pictures = {title: image_grid(images, len(images), scale=2) for title, images in rows.items()}
    width = max(picture.width for picture in pictures.values()) / 100 + 0.2
    heights = [picture.height / 100 + 0.3 for picture in pictures.values()]
    figure = new_figure(width, sum(heights))
    for i, (title, picture) in enumerate(pictures.items()):
        bottom = sum(heights[i + 1 :]) / sum(heights)
        size = (picture.width / 100 / width, picture.height / 100 / sum(heights))
        axes = figure.add_axes((0.1 / width, bottom, *size))
        axes.imshow(np.asarray(picture), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_title(title, fontsize=9, loc="left", pad=3)
        axes.axis("off")
    save_figure(figure, file, tight=False)


def movement_bars(
    file: Target, movements: Sequence[Sequence[float]], labels: Sequence[str]
) -> None:
    """Draw the W2 movements of blocks 0, 1, … of each training pass; later passes are darker.

    Raises:
        ValueError: a pass has no movement, or the labels do not match.
    """
    if not movements or not all(len(m) for m in movements):
        raise ValueError(
            f"the passes have {[len(m) for m in movements]} blocks; expected at least one pass, "
            "and one block in each"
        )
    passes, blocks = len(movements), max(len(m) for m in movements)
    figure = new_figure(max(4.5, 1.2 + 0.3 * blocks * max(passes, 2)), 3.2)
    axes = _axes(figure, "block", r"movement $S_k$")
    axes.set_title("Movement of each block", fontsize=10, loc="left")
    width = 0.8 / passes
    for i, (values, label) in enumerate(zip(movements, labels, strict=True)):
        shade = _DARK if passes == 1 else _LIGHT + (_DARK - _LIGHT) * i / (passes - 1)
        x = np.arange(len(values)) + (i - (passes - 1) / 2) * width
        axes.bar(x, values, 0.92 * width, color=tuple(shade), label=label)
    axes.set_xticks(range(blocks))
    axes.set_ylim(bottom=0)
    if passes > 1:
        axes.legend(fontsize=8, frameon=False)
    save_figure(figure, file)


def curves(
    file: Target,
    lines: Mapping[str, tuple[npt.ArrayLike, npt.ArrayLike]],
    *,
    x_label: str,
    y_label: str,
    log_y: bool = False,
) -> None:
    """Draw named lines (x, y), each (n,), in one plot; values that are not finite leave a gap.

    No two of up to 14 lines look alike. `log_y` draws y, which is then positive, on a log scale.

    Raises:
        ValueError: there is no line, or the lengths of an x and y differ.
    """
    if not lines:
        raise ValueError("there are 0 lines; expected at least one")
    figure = new_figure(5.4, 3.4)
    axes = _axes(figure, x_label, y_label)
    for i, (name, (x, y)) in enumerate(lines.items()):
        few = "o" if len(np.asarray(x)) <= 20 else None
        style, colour = "-" if i < 7 else "--", _COLOURS[i % 7]
        axes.plot(x, y, style, marker=few, markersize=4, lw=1.6, label=name, color=colour)
    if log_y:
        axes.set_yscale("log")
    if all(np.allclose(np.asarray(x, float) % 1, 0) for x, _ in lines.values()):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(lines) > 1:
        axes.legend(fontsize=8, frameon=False)
    save_figure(figure, file)


def new_figure(width: float, height: float) -> Figure:
    """Create a figure, its size in inches, with its own Agg canvas, outside of pyplot."""
    figure = Figure(figsize=(width, height), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _axes(figure: Figure, x_label: str, y_label: str) -> Axes:
    """Add axes with labels and horizontal lines to a figure."""
    axes = figure.add_subplot()
    axes.set_xlabel(x_label, fontsize=9)
    axes.set_ylabel(y_label, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e5e5", lw=0.8)
    axes.set_axisbelow(True)
    return axes


def save_figure(figure: Figure, file: Target, tight: bool = True) -> None:
    """Write a figure as PNG, cropped to its content if `tight`."""
    figure.savefig(file, format="png", dpi=150, bbox_inches="tight" if tight else None)
