"""Repairs of a benchmark: a row with all its files, a search of learning rates, table, plots."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from pipeline.bench.bench import Bench, run_cell, tuner_of
from pipeline.bench.budget import Budget
from pipeline.bench.folder import ROW, SETTINGS, draw_plots, read_rows, write_tables
from pipeline.bench.models import TITLES
from pipeline.bench.problem import HeldOut, open_problem, problem_config
from pipeline.bench.results import outcome
from pipeline.bench.tuning import read_tuned
from pipeline.data.one_writer import one_writer
from pipeline.runtime.console import Progress, say
from pipeline.storage import atomic
from pipeline.storage.records import well_formed

_TRAINING, _TUNING = "training", "tuning"


def remake(
    folder: Path, broken: Sequence[Path], accelerator: Accelerator, progress: Progress
) -> bool:
    """Make broken files of a benchmark again.

    A broken row is measured again. If a file of its training is broken, the model is trained again
    first. Times in a row are those of now.

    Args:
        folder: of the benchmark.
        broken: the files.
        accelerator: device; a single process.
        progress: wraps loops.

    Returns:
        whether it is known how all of them were made.

    Raises:
        UserError: the settings of the benchmark are broken, or its data are gone.
    """
    settings = atomic.read_json(folder / SETTINGS, "benchmark")
    cells = {cell: [path for path in broken if path.is_relative_to(cell)]
             for path in broken if (cell := _cell_of(folder, path)) is not None}  # fmt: skip
    others = [path for path in broken if _cell_of(folder, path) is None]
    with one_writer(folder, "the benchmark in", accelerator):
        for path in others:
            path.unlink(missing_ok=True)
        for path in others:
            if path.parent == folder / _TUNING and not _search(
                folder, settings, path.stem, accelerator, progress
            ):
                return False
        for cell, files in cells.items():
            _run_again(folder, settings, cell, files, accelerator, progress)
        write_tables(folder)
        if any(path.parent.name == "plots" for path in others):
            draw_plots(folder, read_rows(folder))
    return True


def _cell_of(folder: Path, path: Path) -> Path | None:
    """Return the folder DATA/MODEL/seed-N that a file of a benchmark lies in; None for none."""
    parts = path.relative_to(folder).parts
    is_cell = len(parts) > 3 and parts[1] in TITLES and parts[2].startswith("seed-")
    return folder.joinpath(*parts[:3]) if is_cell else None


def _run_again(
    folder: Path,
    settings: dict[str, Any],
    cell: Path,
    broken: Sequence[Path],
    accelerator: Accelerator,
    progress: Progress,
) -> None:
    """Train what is broken of one training, and measure it again."""
    data, model, seed = cell.parts[-3], cell.parts[-2], int(cell.name.removeprefix("seed-"))
    bench = _bench(settings, data, model)
    if any(path.is_relative_to(cell / _TRAINING) for path in broken):
        shutil.rmtree(cell / _TRAINING)
    for path in [*broken, cell / ROW]:
        path.unlink(missing_ok=True)
    config = problem_config(bench.suite, data, bench.overrides, seed)
    problem = open_problem(config, bench.held_out, "test", accelerator, progress)
    tuner = tuner_of(bench, folder, accelerator, progress)
    say(outcome(run_cell(tuner, model, problem, cell)))


def _search(
    folder: Path,
    settings: dict[str, Any],
    model: str,
    accelerator: Accelerator,
    progress: Progress,
) -> bool:
    """Search a learning rate again; return whether the data of the search are known."""
    known = {tuned.data for tuned in read_tuned(folder)}
    known = known or {path.parents[2].name for path in folder.glob(f"*/*/seed-*/{ROW}")}
    if len(known) != 1 or model not in TITLES:
        return False
    (data,) = known
    bench = _bench(settings, data, model)
    config = problem_config(bench.suite, data, bench.overrides, 0)
    problem = open_problem(config, bench.held_out, "test", accelerator, progress)
    tuner_of(bench, folder, accelerator, progress).tuned(model, problem)
    return True


def _bench(settings: dict[str, Any], data: str, model: str) -> Bench:
    """Return a benchmark with the settings of a folder, of one model on one data set.

    Raises:
        UserError: the settings are of another form.
    """
    with well_formed(Path(SETTINGS)):
        sizes = settings["held_out"]
        bench = Bench(
            str(settings["suite"]), (model,), (data,), Budget.parse(str(settings["budget"])), 1,
            int(settings["parameters"]), tuple(settings["overrides"]),
            HeldOut(int(sizes["test"]), int(sizes["compare"]), bool(settings.get("whitened"))),
            tuple(settings["rates"]),
        )  # fmt: skip
    bench.configs()
    return bench
