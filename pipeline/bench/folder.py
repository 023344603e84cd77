"""Folder of a benchmark: its settings, rows, table and plots.

The file bench.json has the settings that all rows share. Each training has a folder with its
row.json, weights and samples, and the search of learning rates has the folder tuning.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.bench.figures import draw_curves, draw_plane, draw_strips
from pipeline.bench.models import TITLES
from pipeline.bench.results import Row, markdown, table_csv
from pipeline.bench.tuning import read_tuned, tuned_line
from pipeline.errors import UserError
from pipeline.storage import atomic, seal
from pipeline.storage.records import from_json

SETTINGS, ROW, SAMPLES = "bench.json", "row.json", "samples.safetensors"


def cell_of(folder: Path, data: str, model: str, seed: int) -> Path:
    """Return the folder of one training."""
    return folder / data / model / f"seed-{seed}"


def is_done(cell: Path) -> bool:
    """Return whether a training has a row without an error."""
    path = cell / ROW
    return (
        path.is_file() and from_json(Row, atomic.read_json(path, "row"), str(path)).error is None
    )


def require_same_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Check that the benchmark of a folder, if it has one, has some settings.

    Raises:
        UserError: they differ.
    """
    path = folder / SETTINGS
    if not path.is_file():
        return
    known = atomic.read_json(path, "benchmark")
    for name in {**settings, **known}:
        before, now = known.get(name), settings.get(name)
        if before != now:
            raise UserError(
                f"{name} of the benchmark at {folder} is {before!r}; this call has "
                f"{now!r}; rows of one table share it; give another --run"
            )


def keep_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings of a new benchmark, and seal its folder."""
    if not (folder / SETTINGS).is_file():
        seal.start(folder)
        atomic.write_json(folder / SETTINGS, settings)


def write_tables(folder: Path, published: bool = False) -> list[Row]:
    """Write table.md and table.csv of all rows in a folder; return the rows.

    Raises:
        UserError: the folder has no benchmark, or a row is damaged.
    """
    settings = atomic.read_json(folder / SETTINGS, "benchmark")
    rows = read_rows(folder)
    budget, most = settings["budget"], settings["parameters"]
    sentences = [
        f"Suite {settings['suite']}; every model has {budget} of training and at most {most:,} "
        "parameters. All have one optimiser, batch size and schedule."
    ]
    if settings["overrides"]:
        sentences.append(f"Settings: {', '.join(settings['overrides'])}.")
    searches = [f"* {tuned_line(tuned)}." for tuned in read_tuned(folder)]
    if not searches:
        sentences.append("All have one learning rate, and no search.")
    given = [*sentences, *(["", *searches] if searches else [])]
    text = markdown(rows, given, published, settings["suite"] == "images")
    atomic.write_bytes(folder / "table.md", text.encode())
    atomic.write_bytes(folder / "table.csv", table_csv(rows).encode())
    return rows


def draw_plots(folder: Path, rows: Sequence[Row]) -> None:
    """Draw the plots of all rows into the folder plots of a benchmark."""
    for data in dict.fromkeys(row.data for row in rows):
        group = [row for row in rows if row.data == data]
        draw_curves(folder / "plots", data, group)
        _draw_samples(folder, data, group)


def read_rows(folder: Path) -> list[Row]:
    """Read the rows of a benchmark, by data set, model and seed.

    Raises:
        UserError: a row is damaged.
    """
    order = list(TITLES)
    rows = [
        from_json(Row, atomic.read_json(path, "row"), str(path))
        for path in sorted(folder.glob(f"*/*/seed-*/{ROW}"))
    ]
    return sorted(rows, key=lambda row: (row.data, order.index(row.model), row.seed))


def _draw_samples(folder: Path, data: str, rows: Sequence[Row]) -> None:
    """Draw samples of the least seed of each model: images, or points with their density."""
    models: dict[str, dict[str, Tensor]] = {}
    for row in rows:
        path = cell_of(folder, data, row.model, row.seed) / SAMPLES
        if row.model not in models and path.is_file():
            models[row.model] = atomic.read_tensors(path)
    shapes = {tuple(tensors["data"].shape[1:]) for tensors in models.values()}
    if shapes == {(2,)}:
        draw_plane(folder / "plots", data, models)
    elif any(len(shape) == 3 for shape in shapes):
        draw_strips(folder / "plots", data, models)
