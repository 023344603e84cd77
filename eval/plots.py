"""Plots, drawn without touching matplotlib's global state, whose import a grid need not wait for.

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
