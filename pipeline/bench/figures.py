"""Plots of a benchmark: metrics against seconds, and points or images of all models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from eval.plots import curves, strips
from eval.plots2d import Panel, samples_and_densities, window
from pipeline.bench.models import TITLES
from pipeline.bench.results import Row
from pipeline.storage import atomic

#: metrics that have a plot: attribute of a point, and label
_METRICS = {"nll": "NLL (nats per sample)", "mmd_m": "MMD² (median distance)", "fid": "FID"}


def draw_curves(folder: Path, data: str, rows: Sequence[Row]) -> None:
    """Plot NLL, MMD and FID against the optimiser's seconds, one line for each model.

    Args:
        folder: of the plots.
        data: the data set.
        rows: its rows; of each model the one with the least seed is drawn.
    """
    first: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: row.seed):
        if row.measured is not None:
            first.setdefault(row.model, row)
    for name, label in _METRICS.items():
        lines = {}
        for model, row in first.items():
            ends = [(row.seconds, _last(row, name))]
            points = [(point.seconds, getattr(point, name)) for point in row.curve] + ends
            known = [(x, y) for x, y in points if y is not None]
            if known:
                x, y = zip(*known, strict=True)
                lines[TITLES[model]] = (x, y)
        few = next((f for row in first.values() if (f := _few(row))), None)
        if few is not None:
            label = f"FID of {few} samples" if name == "fid" else "NLL (nats per dimension)"
        if lines:
            draw = partial(
                curves,
                lines=lines,
                x_label="seconds of the optimiser",
                y_label=label,
                log_y=name != "nll",
            )
            atomic.write_with(folder / f"{data}-{name.partition('_')[0]}.png", draw)


def _last(row: Row, name: str) -> float | None:
    """Return a metric of a finished model; its FID is that of a few samples, as in training."""
    if name == "fid":
        images = None if row.measured is None else row.measured.images
        return None if images is None else images.few_fid
    value: float | None = getattr(row.measured, name)
    return value


def _few(row: Row) -> int | None:
    images = None if row.measured is None else row.measured.images
    return None if images is None else images.few


def draw_strips(folder: Path, data: str, models: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Draw held-out images, and images that the models sample from the same noise.

    Args:
        folder: of the plots.
        data: the data set.
        models: of each model `samples` and held-out images as `data`, uint8 (n, C, H, W).
    """
    rows = {"held-out images": next(iter(models.values()))["data"]}
    rows |= {TITLES[model]: tensors["samples"] for model, tensors in models.items()}
    atomic.write_with(folder / f"{data}-samples.png", lambda file: strips(file, rows))


def draw_plane(folder: Path, data: str, models: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Draw samples and densities of models of the plane, the held-out points first.

    Args:
        folder: of the plots.
        data: the data set.
        models: tensors of each model: samples (m, 2), held-out points (n, 2) as data, and
            log_density (G, G) in the window of these points, if it is known.
    """
    real = next(iter(models.values()))["data"]
    panels = [Panel("data", real)]
    for model, tensors in models.items():
        panels.append(Panel(TITLES[model], tensors["samples"], tensors.get("log_density")))
    path = folder / f"{data}-samples.png"
    atomic.write_with(path, lambda file: samples_and_densities(file, panels, window(real)))
