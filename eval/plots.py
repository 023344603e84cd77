"""Plots of images, movements and curves, drawn without matplotlib's global state.

Every function that writes takes a path or a binary file open for writing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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
    titles: tuple[str, str] = ("before", "after"),
) -> None:
    """Write two image grids next to each other, each under its title.

    Args:
        file: destination of the PNG.
        before: uint8 (N, C, H, W), such as originals.
        after: uint8, the same shape, such as reconstructions.
        columns: images a row.
        titles: printed above the grids.

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
    """Draw the W2 movement S_k of every block as bars, one group a block.

    Args:
        file: destination of the PNG.
        movements: S_1 … S_K of each training pass; K may differ between passes.
        labels: names of the passes, such as `iter 1`; later passes are darker.
        title: printed above the plot.

    Raises:
        ValueError: a pass has no movement, or the labels do not match.
    """
    if not movements or not all(len(m) for m in movements):
        raise ValueError(
            f"the passes have {[len(m) for m in movements]} blocks; expected at least one pass, "
            "and one block in each"
        )
    labels = [f"iter {i + 1}" for i in range(len(movements))] if labels is None else labels
    if len(labels) != len(movements):
        raise ValueError(f"there are {len(labels)} labels; expected {len(movements)}, one a pass")
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
    """Draw named lines in one plot.

    Args:
        file: destination of the PNG.
        lines: name to (x, y), each (n,); values that are not finite leave a gap.
        x_label: label of the x axis.
        y_label: label of the y axis.
        title: printed above the plot.
        log_y: whether the y axis is logarithmic; then all y are positive.
        marks: name to height of dashed lines (a floor, a threshold).

    Raises:
        ValueError: there is no line, or the lengths of an x and y differ.
    """
    if not lines:
        raise ValueError("there are 0 lines; expected at least one")
    figure = _figure(5.4, 3.4)
    axes = _axes(figure, x_label, y_label, title)
    for i, (name, (x, y)) in enumerate(lines.items()):
        xs, ys = np.asarray(x, float), np.asarray(y, float)
        if xs.shape != ys.shape or xs.ndim != 1:
            raise ValueError(
                f"x and y of the line '{name}' have the shapes {xs.shape} and {ys.shape}; "
                "expected (n,) for both"
            )
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


def _figure(width: float, height: float) -> Figure:
    """Create a figure, its size in inches, with its own Agg canvas, outside of pyplot."""
    figure = Figure(figsize=(width, height), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _axes(figure: Figure, x_label: str, y_label: str, title: str) -> Axes:
    """Add axes with labels, a title and horizontal lines to a figure."""
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
    """Add a legend to axes."""
    axes.legend(fontsize=8, frameon=False)


def _save(figure: Figure, file: Target, tight: bool = True) -> None:
    """Write a figure as PNG, cropped to its content if `tight`."""
    options: dict[str, Any] = {"bbox_inches": "tight"} if tight else {}
    figure.savefig(file, format="png", dpi=150, **options)
