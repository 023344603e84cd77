"""Figures of two-dimensional flows: samples, densities and trajectories.

Every function that writes takes a path or a binary file open for writing. Points are (n, 2).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from eval.pictures import Target

Points = Tensor | npt.NDArray[np.floating]

_DATA, _NOISE = "#0072B2", "#D55E00"
_INCH = 2.6


def window(points: Points, margin: float = 0.06) -> tuple[float, float]:
    """Compute a square window (low, high), the same on both axes, that excludes outliers.

    Args:
        points: (n, 2).
        margin: added on each side, as a fraction of the width.

    Raises:
        ValueError: there are no finite points.
    """
    x = _array(points)
    x = x[np.isfinite(x).all(axis=1)]
    if not len(x):
        raise ValueError("there are 0 finite points; expected at least one to compute a window")
    low, high = np.quantile(x, [0.001, 0.999])
    space = margin * max(high - low, 1e-3)
    return float(low - space), float(high + space)


def scatter(
    file: Target,
    panels: Sequence[tuple[str, Points]],
    limits: tuple[float, float],
    columns: int | None = None,
) -> None:
    """Draw samples as dots, in one panel for each set.

    Args:
        file: destination of the PNG.
        panels: title and points (n, 2) of each.
        limits: of both axes.
        columns: panels a row; all in one row by default.

    Raises:
        ValueError: there is no panel, or points have another shape.
    """
    figure, axes = _panels(len(panels), columns)
    for panel, (title, points) in zip(axes, panels, strict=True):
        _dots(panel, points, _DATA, limits, title)
    _save(figure, file)


def density(
    file: Target,
    data: Points,
    log_density: npt.ArrayLike,
    limits: tuple[float, float],
    *,
    titles: tuple[str, str] = ("data", "model density"),
) -> None:
    """Draw the histogram of data next to a model's density, with one colour scale.

    Args:
        file: destination of the PNG.
        data: (n, 2).
        log_density: (G, G), log p at the centres of a G × G grid of the window, first row lowest.
        limits: of both axes.
        titles: of the two panels.

    Raises:
        ValueError: the density is not square, or the points have another shape.
    """
    values = np.exp(np.asarray(log_density, np.float64))
    if values.ndim != 2 or values.shape[0] != values.shape[1]:
        raise ValueError(f"the density has the shape {values.shape}; expected (G, G)")
    bins, x = len(values), _array(data)
    edges = np.linspace(*limits, bins + 1)
    counted, _, _ = np.histogram2d(x[:, 1], x[:, 0], bins=[edges, edges])
    counted /= len(x) * (edges[1] - edges[0]) ** 2
    # A quantile, so that one very high cell does not make the others white.
    top = float(np.quantile(np.concatenate([counted[counted > 0], values[values > 1e-4]]), 0.99))
    figure, axes = _panels(2, None, inch=1.5 * _INCH)
    for panel, picture, title in zip(axes, (counted, values), titles, strict=True):
        _bare(panel, limits, title)
        panel.imshow(
            picture, origin="lower", extent=(*limits, *limits), cmap="magma_r", vmin=0, vmax=top,
            interpolation="nearest",
        )  # fmt: skip
    _save(figure, file)


def trajectories(
    file: Target,
    forward: Sequence[Points],
    backward: Sequence[Points],
    limits: tuple[float, float],
) -> None:
    """Draw two rows of panels, data to noise and noise to data, with one panel a block.

    Args:
        file: destination of the PNG.
        forward: K + 1 sets of points, z_0 … z_K.
        backward: K + 1 sets of other points, z_K … z_0.
        limits: of both axes.

    Raises:
        ValueError: the lengths differ, or are below 2.
    """
    if len(forward) != len(backward) or len(forward) < 2:
        raise ValueError(
            f"there are {len(forward)} forward and {len(backward)} backward sets; expected "
            "K + 1 ≥ 2 of each"
        )
    count = len(forward)
    figure, axes = _panels(2 * count, count)
    for index, panel in enumerate(axes):
        back = index >= count
        stage = 2 * count - 1 - index if back else index
        points = backward[index - count] if back else forward[index]
        name = "data" if stage == 0 else "noise" if stage == count - 1 else ""
        title = f"$z_{{{stage}}}$ {name}".strip()
        _dots(panel, points, _NOISE if back else _DATA, limits, title)
    axes[0].set_ylabel("data → noise", fontsize=8)
    axes[count].set_ylabel("noise → data", fontsize=8)
    _save(figure, file)


def frames(
    states: Sequence[Points],
    limits: tuple[float, float],
    titles: Sequence[str],
    *,
    pixels: int = 320,
) -> list[Image.Image]:
    """Draw one picture for each state, all of one size, for an animation.

    Args:
        states: sets of the same points (n, 2) as they move.
        limits: of both axes.
        titles: one for each state.
        pixels: side of a picture.

    Raises:
        ValueError: the numbers of states and titles differ.
    """
    if len(states) != len(titles):
        raise ValueError(f"there are {len(titles)} titles; expected {len(states)}, one a state")
    return [_frame(x, limits, t, pixels) for x, t in zip(states, titles, strict=True)]


def _frame(points: Points, limits: tuple[float, float], title: str, pixels: int) -> Image.Image:
    """Draw points (n, 2) as a picture of (pixels, pixels)."""
    figure = Figure(figsize=(pixels / 100, pixels / 100), dpi=100, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.02, 0.02, 0.96, 0.88))
    _dots(axes, points, _DATA, limits, title)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(64)


def _panels(count: int, columns: int | None, inch: float = _INCH) -> tuple[Figure, list[Axes]]:
    """Create a figure of square panels, row by row."""
    if count < 1:
        raise ValueError(f"there are {count} panels; expected at least one")
    columns = min(count, columns or count)
    rows = -(-count // columns)
    figure = Figure(figsize=(inch * columns, inch * rows), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(count)]


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


def _save(figure: Figure, file: Target) -> None:
    """Write a figure as PNG, cropped to its content."""
    figure.savefig(file, format="png", dpi=130, bbox_inches="tight")
