"""Chooses a learning rate for every model with the same effort."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flows.errors import SolveError
from pipeline.bench.measure import measure
from pipeline.bench.models import TITLES
from pipeline.bench.problem import Problem
from pipeline.bench.training import Checkpoint, Training
from pipeline.config.plain import with_values
from pipeline.errors import JkoflowError, UserError
from pipeline.runtime.console import say
from pipeline.storage import atomic
from pipeline.storage.records import from_json, to_json

#: fraction of the budget that each learning rate has
PART = 0.25
#: seed of the search; the table has the seeds from 0
SEED = 1_000_000
_FOLDER = "tuning"


@dataclass(frozen=True)
class Tuned:
    """Learning rates that were tried for a model.

    Attributes:
        model: a key of `pipeline.bench.models.TITLES`.
        data: the data set.
        budget: of each training, in words.
        rates: the learning rates.
        nll: held-out NLL in nats of each; None where the training failed.
        chosen: the learning rate of the least NLL.
    """

    model: str
    data: str
    budget: str
    rates: list[float]
    nll: list[float | None]
    chosen: float


class Tuner:
    """Search of the learning rates of a benchmark, one model at a time.

    Args:
        training: of the benchmark.
        rates: peak learning rates; none keeps that of the configuration.
        folder: of the benchmark.
        open_data: opens the data of the search, with its own seed or split.
    """

    def __init__(
        self,
        training: Training,
        rates: tuple[float, ...],
        folder: Path,
        open_data: Callable[[], Problem],
    ) -> None:
        self.training, self.rates, self.folder = training, rates, folder
        self.open_data = open_data
        self._data: Problem | None = None

    def tuned(self, model: str, problem: Problem) -> Problem:
        """Return a problem with the learning rate of a model.

        Raises:
            UserError: the budget is too small.
            JkoflowError: the training fails with every rate.
        """
        if not self.rates:
            return problem
        path = self.folder / _FOLDER / f"{model}.json"
        if path.is_file():
            chosen = from_json(Tuned, atomic.read_json(path, "search"), str(path)).chosen
        else:
            self._data = self._data or self.open_data()
            chosen = tune(self.training, model, self._data, self.rates, self.folder).chosen
        config = with_values(problem.config, {"train.lr": chosen})
        return dataclasses.replace(problem, config=config)


def tune(
    training: Training, model: str, problem: Problem, rates: tuple[float, ...], folder: Path
) -> Tuned:
    """Search the learning rate of a model, and write the search into the folder.

    Each rate trains the model with a quarter of the budget. The NLL of held-out samples that the
    table does not use decides.

    Args:
        training: of the benchmark.
        model: a key of `pipeline.bench.models.TITLES`.
        problem: data of the search, with its own seed or split.
        rates: peak learning rates.
        folder: of the benchmark.

    Raises:
        UserError: the budget is too small.
        JkoflowError: the training fails with every rate.
    """
    budget = training.budget.part(PART)
    short = dataclasses.replace(training, budget=budget)
    begun = {rate: folder / _FOLDER / f"{model}-{problem.name}-{rate}" for rate in rates}
    values = [_nll(short, model, problem, rate, place) for rate, place in begun.items()]
    known = [(nll, rate) for nll, rate in zip(values, rates, strict=True) if nll is not None]
    if not known:
        tried = ", ".join(f"{rate:g}" for rate in rates)
        raise JkoflowError(f"training fails with each learning rate of {tried}; lower --tune")
    tuned = Tuned(model, problem.name, str(budget), list(rates), values, min(known)[1])
    atomic.write_json(folder / _FOLDER / f"{model}.json", to_json(tuned))
    for place in begun.values():
        shutil.rmtree(place, ignore_errors=True)
    say(tuned_line(tuned))
    return tuned


def read_tuned(folder: Path) -> list[Tuned]:
    """Read all searches of a benchmark, in the order of the models.

    Raises:
        UserError: a file is damaged.
    """
    paths = [folder / _FOLDER / f"{model}.json" for model in TITLES]
    return [
        from_json(Tuned, atomic.read_json(path, "search"), str(path))
        for path in paths
        if path.is_file()
    ]


def tuned_line(tuned: Tuned) -> str:
    """Return a search in words."""
    tried = (
        f"{rate:g} ({'failed' if nll is None else format(nll, '.3f')})"
        for rate, nll in zip(tuned.rates, tuned.nll, strict=True)
    )
    return (
        f"{TITLES[tuned.model]}: learning rate {tuned.chosen:g}; tried with {tuned.budget} on "
        f"{tuned.data} (NLL): {', '.join(tried)}"
    )


def _nll(
    training: Training, model: str, problem: Problem, rate: float, folder: Path
) -> float | None:
    """Return the held-out NLL after a training with a learning rate; None if it fails.

    The training in the folder goes on, where a signal has ended it.
    """
    config = with_values(problem.config, {"train.lr": rate})
    tried = dataclasses.replace(problem, config=config)

    def ignore(_: Checkpoint) -> None:
        """Measure nothing on the way."""

    try:
        trained = training.train(model, tried, folder, ignore)
        measured, _ = measure(trained.model, tried, training.accelerator.device, quick=True)
    except UserError:
        raise
    except (JkoflowError, SolveError) as error:
        say(f"{TITLES[model]} with learning rate {rate:g} failed: {error}")
        return None
    return measured.nll if math.isfinite(measured.nll) else None
