"""Plots of a benchmark: metrics against seconds, and samples of all models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from eval.plots import curves
from eval.plots2d import Panel, samples_and_densities, window
from pipeline.bench.models import TITLES
from pipeline.bench.results import Row
from pipeline.storage import atomic

#: metrics that have a plot: attribute of a point, and label
_METRICS = {"nll": "NLL (nats per sample)", "mmd_m": "MMD² (median distance)"}


def draw_curves(folder: Path, data: str, rows: Sequence[Row]) -> None:
    """Plot NLL and MMD against the optimiser's seconds, one line for each model.

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
            ends = [(row.seconds, getattr(row.measured, name))]
            points = [(point.seconds, getattr(point, name)) for point in row.curve] + ends
            known = [(x, y) for x, y in points if y is not None]
            if known:
                x, y = zip(*known, strict=True)
                lines[TITLES[model]] = (x, y)
        if lines:
            draw = partial(
                curves,
                lines=lines,
                x_label="seconds of the optimiser",
                y_label=label,
                log_y=name != "nll",
            )
            atomic.write_with(folder / f"{data}-{name.partition('_')[0]}.png", draw)


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
