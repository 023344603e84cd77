"""Runs a benchmark: every model on every data set and seed, each once.

The folder has bench.json, the settings that all rows share, and table and plots of what is
finished. Each training has a folder with its row.json, weights and samples, and the search of
learning rates has the folder tuning. A benchmark that was
interrupted, or gets further models, data sets or seeds, trains only what is missing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from eval.plots2d import window
from flows.baselines.base import DensityModel
from flows.baselines.registry import config_to_dict
from flows.errors import SolveError
from pipeline.bench.budget import Budget
from pipeline.bench.figures import draw_curves, draw_plane, draw_strips
from pipeline.bench.measure import KEPT, log_density, measure
from pipeline.bench.models import BLOCKWISE, TITLES, check_models, require_one_fits
from pipeline.bench.problem import DEFAULTS, HeldOut, Problem, open_problem, problem_config
from pipeline.bench.results import Point, Row, markdown, outcome, table_csv
from pipeline.bench.training import CHECKPOINT, Checkpoint, Training
from pipeline.bench.tuning import PART, SEED, Tuner, read_tuned, tuned_line
from pipeline.config.schema import Config
from pipeline.errors import JkoflowError, UserError
from pipeline.runtime.console import Progress, duration, progress_bar, say
from pipeline.storage import atomic, seal
from pipeline.storage.records import from_json, to_json

SETTINGS, ROW, SAMPLES = "bench.json", "row.json", "samples.safetensors"
#: parameters of every model, unless the caller chooses: those of the paper's smallest models
PARAMETERS = {"toy2d": 35_000, "tabular": 76_000, "images": 200_000}
#: images in a row of the picture of samples
_STRIP = 16


@dataclass(frozen=True)
class Bench:
    """A benchmark.

    Attributes:
        suite: toy2d, tabular or images.
        models: keys of `pipeline.bench.models.TITLES`.
        data: data sets; () takes those of the suite.
        budget: of every training.
        seeds: number of seeds, from 0.
        parameters: the most that a model may have; None takes those of the suite.
        overrides: `section.key=value` for the configurations.
        held_out: sizes of the held-out samples.
        rates: learning rates that are tried for every model; () takes train.lr.
    """

    suite: str
    models: tuple[str, ...]
    data: tuple[str, ...]
    budget: Budget
    seeds: int = 3
    parameters: int | None = None
    overrides: tuple[str, ...] = ()
    held_out: HeldOut = field(default_factory=HeldOut)
    rates: tuple[float, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The data sets."""
        return self.data or DEFAULTS[self.suite]

    @property
    def most(self) -> int:
        """The most parameters that a model may have."""
        return PARAMETERS[self.suite] if self.parameters is None else self.parameters

    def configs(self) -> dict[str, Config]:
        """Return the configuration of each data set, of seed 0.

        Raises:
            UserError: a name, a number or a setting is wrong.
        """
        check_models(self.models)
        if self.seeds < 1:
            raise UserError(f"--seeds is {self.seeds}; expected at least 1")
        if not all(0 < rate < math.inf for rate in self.rates):
            raise UserError(f"--tune has {list(self.rates)}; expected positive learning rates")
        configs = {n: problem_config(self.suite, n, self.overrides, 0) for n in self.names}
        for name, config in configs.items():
            if config.jko is None and self.suite != "images":
                raise UserError(
                    f"the configuration of {name} has train.objective={config.train.objective}; "
                    "expected jko, from which lfm and fm follow; remove it and choose --models"
                )
        return configs

    def settings(self) -> dict[str, Any]:
        """Return what all rows share, for bench.json."""
        sizes = self.held_out
        return {
            "suite": self.suite,
            "budget": str(self.budget),
            "parameters": self.most,
            "overrides": list(self.overrides),
            "held_out": {"test": sizes.test, "compare": sizes.compare},
            "rates": list(self.rates),
            **({"whitened": True} if sizes.whitened else {}),
        }

    def open_search(
        self, accelerator: Accelerator | None = None, progress: Progress = progress_bar
    ) -> Problem:
        """Open the data on which learning rates are compared.

        They are of the first data set: points of a further seed, the validation split of a table,
        or held-out images. No likelihood of the table uses them.

        Raises:
            UserError: the data are missing, damaged or too few.
        """
        config = problem_config(self.suite, self.names[0], self.overrides, SEED)
        return open_problem(config, self.held_out, "validation", accelerator, progress)


def run_bench(
    bench: Bench,
    folder: Path,
    accelerator: Accelerator,
    progress: Progress,
    published: bool = False,
) -> list[Row]:
    """Train and measure what is missing; write the table after each training, plots at the end.

    Args:
        bench: the benchmark.
        folder: of its files.
        accelerator: device; a single process.
        progress: wraps loops.
        published: whether the table has the published figures.

    Returns:
        the rows of all trainings in the folder. A training that fails has a row with its error,
        and is tried again by the next call.

    Raises:
        UserError: a setting is wrong, the data are missing, or the folder holds rows of other
            settings.
    """
    if accelerator.num_processes > 1:
        raise UserError(
            f"bench has {accelerator.num_processes} processes; expected 1; start it without a "
            "launcher"
        )
    configs = bench.configs()
    _require_same_settings(folder / SETTINGS, bench.settings())
    tuner = tuner_of(bench, folder, accelerator, progress)
    cells = [(s, data, m) for s in range(bench.seeds) for data in configs for m in bench.models]
    waiting = sum(not _is_done(_cell(folder, data, m, s)) for s, data, m in cells)
    if waiting:
        say(_work(bench, folder, waiting))
    trained, began = 0, time.monotonic()
    for seed in range(bench.seeds):
        for data in configs:
            missing = [m for m in bench.models if not _is_done(_cell(folder, data, m, seed))]
            if not missing:
                continue
            config = problem_config(bench.suite, data, bench.overrides, seed)
            problem = open_problem(config, bench.held_out, "test", accelerator, progress)
            require_one_fits(bench.models, config, problem.source.shape, bench.most)
            _keep_settings(folder, bench.settings())
            for model in missing:
                say(f"{TITLES[model]} on {data}, seed {seed}, {bench.budget}")
                row = run_cell(tuner, model, problem, _cell(folder, data, model, seed))
                say(outcome(row))
                write_tables(folder, published)
                trained += 1
                left = (time.monotonic() - began) / trained * (waiting - trained)
                if trained < waiting:
                    say(f"{trained} of {waiting} trainings; about {duration(left)} are left")
    rows = write_tables(folder, published)
    draw_plots(folder, rows)
    return rows


def _work(bench: Bench, folder: Path, waiting: int) -> str:
    """Describe the trainings of a call, and their seconds where the budget has them."""
    budget, searched = bench.budget, {tuned.model for tuned in read_tuned(folder)}
    searches = len(bench.rates) * len(set(bench.models) - searched)
    line = f"{waiting} training{'s' * (waiting > 1)} of {budget}"
    if searches:
        line += f", and {searches} of {budget.part(PART)} that choose learning rates"
    if budget.unit == "seconds":
        seconds = waiting * budget.amount + searches * budget.part(PART).amount
        line += f": {duration(seconds)} of optimiser steps, without measurements"
    return line


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


def tuner_of(
    bench: Bench, folder: Path, accelerator: Accelerator, progress: Progress
) -> Tuner:
    """Return the search of learning rates of a benchmark, with its trainings."""
    training = Training(bench.budget, bench.most, accelerator, progress)
    return Tuner(training, bench.rates, folder, partial(bench.open_search, accelerator, progress))


def run_cell(tuner: Tuner, model: str, problem: Problem, cell: Path) -> Row:
    """Train and measure one model; a failure of the training becomes its row."""
    training = tuner.training
    device = training.accelerator.device

    def record(checkpoint: Checkpoint) -> Point | None:
        try:
            metrics, _ = measure(checkpoint.model, problem, device, quick=True)
        except (JkoflowError, SolveError) as error:
            say(f"not measured at batch {checkpoint.batches}: {error}")
            return None
        fid = None if metrics.images is None else metrics.images.fid
        place = (checkpoint.seconds, checkpoint.batches)
        say(f"NLL {metrics.nll:.3f} after {checkpoint.batches:,} batches")
        return Point(*place, metrics.nll, metrics.mmd_m, fid)

    seed = problem.config.train.seed
    try:
        problem = tuner.tuned(model, problem)
        trained = training.train(model, problem, cell / "training", record)
        metrics, samples = measure(trained.model, problem, device)
    except UserError:
        raise
    except (JkoflowError, SolveError) as error:
        failed = Row(problem.name, model, seed, problem.note, error=str(error))
        atomic.write_json(cell / ROW, to_json(failed))
        (cell / "training" / CHECKPOINT).unlink(missing_ok=True)
        return failed
    compare = problem.compare[:KEPT]
    kept = {"samples": samples[:KEPT], "data": compare}
    if problem.pictures is not None:
        kept = {"samples": samples[:_STRIP].clone(), "data": problem.pictures.real(_STRIP)}
    if problem.dim == 2 and seed == 0:
        kept |= _density(trained.model, window(compare), device)
    atomic.write_tensors(cell / SAMPLES, kept)
    _save(trained.model, model, cell)
    row = Row(
        problem.name,
        model,
        seed,
        problem.note,
        parameters=trained.parameters,
        width=trained.width,
        lr=problem.learning_rate,
        seconds=round(trained.seconds, 3),
        overhead=round(trained.overhead, 3),
        batches=trained.batches,
        measured=metrics,
        curve=trained.curve,
    )
    atomic.write_json(cell / ROW, to_json(row))
    (cell / "training" / CHECKPOINT).unlink(missing_ok=True)
    return row


def _density(
    model: DensityModel, limits: tuple[float, float], device: torch.device
) -> dict[str, Tensor]:
    """Return log p on the grid of a window; nothing where an ODE of the grid is not solved."""
    try:
        return {"log_density": log_density(model, limits, device)}
    except SolveError as error:
        say(f"the density is not drawn: {error}")
        return {}


def _save(model: DensityModel, name: str, cell: Path) -> None:
    """Write the configuration and the weights of a baseline; a run directory has the others'."""
    if name not in BLOCKWISE:
        described = {"model": name, "dim": model.dim, "config": config_to_dict(model.config)}
        atomic.write_tensors(cell / "model.safetensors", model.state_dict())
        atomic.write_json(cell / "model.json", described)


def _draw_samples(folder: Path, data: str, rows: Sequence[Row]) -> None:
    """Draw samples of the least seed of each model: images, or points with their density."""
    models: dict[str, dict[str, Tensor]] = {}
    for row in rows:
        path = _cell(folder, data, row.model, row.seed) / SAMPLES
        if row.model not in models and path.is_file():
            models[row.model] = atomic.read_tensors(path)
    shapes = {tuple(tensors["data"].shape[1:]) for tensors in models.values()}
    if shapes == {(2,)}:
        draw_plane(folder / "plots", data, models)
    elif any(len(shape) == 3 for shape in shapes):
        draw_strips(folder / "plots", data, models)


def _cell(folder: Path, data: str, model: str, seed: int) -> Path:
    return folder / data / model / f"seed-{seed}"


def _is_done(cell: Path) -> bool:
    """Return whether a training has a row without an error."""
    path = cell / ROW
    return (
        path.is_file() and from_json(Row, atomic.read_json(path, "row"), str(path)).error is None
    )


def _require_same_settings(path: Path, settings: dict[str, Any]) -> None:
    """Check that the benchmark of a folder, if it has one, has some settings.

    Raises:
        UserError: they differ.
    """
    if not path.is_file():
        return
    known = atomic.read_json(path, "benchmark")
    for name in {**settings, **known}:
        before, now = known.get(name), settings.get(name)
        if before != now:
            raise UserError(
                f"{name} of the benchmark at {path.parent} is {before!r}; this call has "
                f"{now!r}; rows of one table share it; give another --run"
            )


def _keep_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings of a new benchmark, and seal its folder."""
    if not (folder / SETTINGS).is_file():
        seal.start(folder)
        atomic.write_json(folder / SETTINGS, settings)
