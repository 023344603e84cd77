"""Runs a benchmark: every model on every data set and seed, each once.

A benchmark that was interrupted, or gets further models, data sets or seeds, trains only what is
missing. `pipeline.bench.folder` describes its files.
"""

from __future__ import annotations

import math
import time
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
from pipeline.bench.folder import (
    ROW,
    SAMPLES,
    cell_of,
    draw_plots,
    is_done,
    keep_settings,
    require_same_settings,
    write_tables,
)
from pipeline.bench.measure import KEPT, log_density, measure
from pipeline.bench.models import BLOCKWISE, TITLES, check_models, require_one_fits
from pipeline.bench.problem import DEFAULTS, HeldOut, Problem, open_problem, problem_config
from pipeline.bench.results import Point, Row, outcome
from pipeline.bench.training import CHECKPOINT, Checkpoint, Training
from pipeline.bench.tuning import PART, SEED, Tuner, read_tuned
from pipeline.config.schema import Config
from pipeline.errors import JkoflowError, UserError
from pipeline.runtime.console import Progress, duration, progress_bar, say
from pipeline.storage import atomic
from pipeline.storage.records import to_json

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
        positive = all(0 < rate < math.inf for rate in self.rates)
        if not positive or len(set(self.rates)) != len(self.rates):
            raise UserError(
                f"--tune has {list(self.rates)}; expected positive learning rates, each of them "
                "once"
            )
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
    require_same_settings(folder, bench.settings())
    tuner = tuner_of(bench, folder, accelerator, progress)
    cells = [(s, data, m) for s in range(bench.seeds) for data in configs for m in bench.models]
    waiting = sum(not is_done(cell_of(folder, data, m, s)) for s, data, m in cells)
    if waiting:
        say(_work(bench, folder, waiting))
    trained, began = 0, time.monotonic()
    for seed in range(bench.seeds):
        for data in configs:
            missing = [m for m in bench.models if not is_done(cell_of(folder, data, m, seed))]
            if not missing:
                continue
            config = problem_config(bench.suite, data, bench.overrides, seed)
            problem = open_problem(config, bench.held_out, "test", accelerator, progress)
            require_one_fits(bench.models, config, problem.source.shape, bench.most)
            keep_settings(folder, bench.settings())
            for model in missing:
                say(f"{TITLES[model]} on {data}, seed {seed}, {bench.budget}")
                row = run_cell(tuner, model, problem, cell_of(folder, data, model, seed))
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
