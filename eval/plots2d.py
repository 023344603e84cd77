"""Figures of two-dimensional flows: samples, densities and trajectories of points (n, 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from eval.pictures import Target
from eval.plots import new_figure, save_figure

Points = Tensor | npt.NDArray[np.floating]

_DATA, _NOISE = "#0072B2", "#D55E00"
_INCH, _MARGIN, _PIXELS, _BINS = 2.6, 0.06, 320, 32


def window(points: Points) -> tuple[float, float]:
    """Compute a square window (low, high) of points (n, 2) that excludes outliers.

    Raises:
        ValueError: there are no finite points.
    """
    x = _array(points)
    x = x[np.isfinite(x).all(axis=1)]
    if not len(x):
        raise ValueError("there are 0 finite points; expected at least one to compute a window")
    low, high = np.quantile(x, [0.001, 0.999])
    space = _MARGIN * max(high - low, 1e-3)
    return float(low - space), float(high + space)


def scatter(
    file: Target, panels: Sequence[tuple[str, Points]], limits: tuple[float, float]
) -> None:
    """Draw samples as dots, in one panel for each title with its points (n, 2).

    Raises:
        ValueError: there is no panel, or points have another shape.
    """
    figure, axes = _panels(1, len(panels))
    for panel, (title, points) in zip(axes, panels, strict=True):
        _dots(panel, points, _DATA, limits, title)
    save_figure(figure, file)


@dataclass(frozen=True)
class Panel:
    """Column of a figure of samples and densities.

    Attributes:
        title: of the column.
        points: samples (n, 2).
        log_density: log p (G, G) at the centres of a grid of the window, the lowest row first;
            None draws the histogram of the samples.
    """

    title: str
    points: Points
    log_density: npt.ArrayLike | Tensor | None = None


def samples_and_densities(
    file: Target, columns: Sequence[Panel], limits: tuple[float, float]
) -> None:
    """Draw samples as dots in a row, and densities below them with one colour scale.

    Raises:
        ValueError: there is no column, a density is not square, or points have another shape.
    """
    figure, axes = _panels(2, len(columns))
    pictures = [
        _histogram(_array(column.points), _BINS, limits)
        if column.log_density is None
        else _density(column.log_density)
        for column in columns
    ]
    # A quantile of the first column, so that one very high cell does not make the others white.
    top = float(np.quantile(pictures[0][pictures[0] > 0], 0.99)) if pictures[0].any() else 1.0
    for index, (column, picture) in enumerate(zip(columns, pictures, strict=True)):
        _dots(axes[index], column.points, _DATA, limits, column.title)
        _shade(axes[len(columns) + index], picture, limits, "", top)
    save_figure(figure, file)


def density(
    file: Target, data: Points, log_density: npt.ArrayLike, limits: tuple[float, float]
) -> None:
    """Draw the histogram of data (n, 2) next to a model's density, with one colour scale.

    `log_density` (G, G) is log p at the centres of a grid of the window, first row lowest.

    Raises:
        ValueError: the density is not square, or the points have another shape.
    """
    values = _density(log_density)
    counted = _histogram(_array(data), len(values), limits)
    # A quantile, so that one very high cell does not make the others white.
    top = float(np.quantile(np.concatenate([counted[counted > 0], values[values > 1e-4]]), 0.99))
    figure, axes = _panels(1, 2, inch=1.5 * _INCH)
    pictures = {"data": counted, "model density": values}
    for panel, (title, picture) in zip(axes, pictures.items(), strict=True):
        _shade(panel, picture, limits, title, top)
    save_figure(figure, file)


def trajectories(
    file: Target,
    forward: Sequence[Points],
    backward: Sequence[Points],
    limits: tuple[float, float],
) -> None:
    """Draw the points z_0 … z_K from data to noise in one row, and z_K … z_0 below.

    Raises:
        ValueError: the lengths differ, or are below 2.
    """
    if len(forward) != len(backward) or len(forward) < 2:
        raise ValueError(
            f"there are {len(forward)} forward and {len(backward)} backward sets; expected "
            "K + 1 ≥ 2 of each"
        )
    count = len(forward)
    figure, axes = _panels(2, count)
    for index, panel in enumerate(axes):
        back = index >= count
        stage = 2 * count - 1 - index if back else index
        points = backward[index - count] if back else forward[index]
        name = "data" if stage == 0 else "noise" if stage == count - 1 else ""
        title = f"$z_{{{stage}}}$ {name}".strip()
        _dots(panel, points, _NOISE if back else _DATA, limits, title)
    axes[0].set_ylabel("data → noise", fontsize=8)
    axes[count].set_ylabel("noise → data", fontsize=8)
    save_figure(figure, file)


def frames(
    states: Sequence[Points], limits: tuple[float, float], titles: Sequence[str]
) -> list[Image.Image]:
    """Draw one picture for each state, points (n, 2), all of one size, for an animation."""
    return [_frame(points, limits, t) for points, t in zip(states, titles, strict=True)]


def _frame(points: Points, limits: tuple[float, float], title: str) -> Image.Image:
    """Draw points (n, 2) as a square picture."""
    figure = new_figure(_PIXELS / 100, _PIXELS / 100)
    axes = figure.add_axes((0.02, 0.02, 0.96, 0.88))
    _dots(axes, points, _DATA, limits, title)
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())  # type: ignore[attr-defined]
    return Image.fromarray(pixels).convert("RGB").quantize(64)


def _panels(rows: int, columns: int, inch: float = _INCH) -> tuple[Figure, list[Axes]]:
    """Create a figure of square panels, row by row."""
    if not rows * columns:
        raise ValueError("there are 0 panels; expected at least one")
    figure = new_figure(inch * columns, inch * rows)
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(rows * columns)]


def _density(log_density: npt.ArrayLike | Tensor) -> npt.NDArray[np.float64]:
    """Return the density (G, G) of its logarithm after a check of the shape."""
    values: npt.NDArray[np.float64] = np.exp(np.asarray(log_density, np.float64))
    if values.ndim != 2 or values.shape[0] != values.shape[1]:
        raise ValueError(f"the density has the shape {values.shape}; expected (G, G)")
    return values


def _histogram(
    x: npt.NDArray[np.float64], bins: int, limits: tuple[float, float]
) -> npt.NDArray[np.float64]:
    """Return the density (bins, bins) of points x (n, 2) by their counts."""
    edges = np.linspace(*limits, bins + 1)
    counted, _, _ = np.histogram2d(x[:, 1], x[:, 0], bins=[edges, edges])
    return counted / (max(len(x), 1) * (edges[1] - edges[0]) ** 2)


def _shade(
    axes: Axes,
    picture: npt.NDArray[np.float64],
    limits: tuple[float, float],
    title: str,
    top: float,
) -> None:
    """Draw a density (G, G) as colours from 0 to `top`."""
    _bare(axes, limits, title)
    axes.imshow(
        picture, origin="lower", extent=(*limits, *limits), cmap="magma_r", vmin=0, vmax=top,
        interpolation="nearest",
    )  # fmt: skip


def _bare(axes: Axes, limits: tuple[float, float], title: str) -> None:
    """Set limits and title of square axes without ticks."""
    axes.set_title(title, fontsize=9)
    axes.set_xlim(*limits)
    axes.set_ylim(*limits)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_aspect("equal")
    for spine in axes.spines.values():
        spine.set_color("#dddddd")


def _dots(
    axes: Axes, points: Points, colour: str, limits: tuple[float, float], title: str
) -> None:
    """Draw points (n, 2) as dots."""
    x = _array(points)
    _bare(axes, limits, title)
    # More points are drawn fainter, so that the darkness of a region shows its density.
    alpha = float(np.clip(1500 / max(len(x), 1), 0.08, 0.6))
    axes.scatter(x[:, 0], x[:, 1], s=3, c=colour, alpha=alpha, linewidths=0, rasterized=True)


def _array(points: Points) -> npt.NDArray[np.float64]:
    """Convert points to a float64 array after a check of their shape (n, 2)."""
    array = points.detach().cpu().numpy() if isinstance(points, Tensor) else points
    x: npt.NDArray[np.float64] = np.asarray(array, np.float64)
    if x.ndim != 2 or x.shape[1] != 2:
        raise ValueError(f"the points have the shape {x.shape}; expected (n, 2)")
    return x
