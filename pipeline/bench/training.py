"""Trains one model of a benchmark on one problem within a budget."""

from __future__ import annotations

import copy
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from flows.baselines.base import DensityModel
from flows.baselines.cnf import FlowModel
from flows.baselines.registry import make_baseline
from flows.errors import SolveError
from pipeline.bench.budget import Budget, used_seconds
from pipeline.bench.models import (
    BLOCKWISE,
    TITLES,
    WARMUP,
    as_jko,
    baseline_config,
    block_count,
    blockwise_config,
    pass_count,
    width_for,
)
from pipeline.bench.problem import Problem, batch_of, batches_of
from pipeline.bench.results import Point
from pipeline.config.schema import Config
from pipeline.errors import JkoflowError
from pipeline.optim.ema import Ema
from pipeline.optim.learning_rate import set_learning_rate, warmup_cosine
from pipeline.optim.optimisers import MuonAdam, make_optimizer
from pipeline.runs.directory import CONFIG, checkpoint_file, read_config, read_manifest
from pipeline.runs.manifest import FILE
from pipeline.runs.passes import Pass
from pipeline.runs.run import open_run
from pipeline.runtime import signals
from pipeline.runtime.console import Progress, say
from pipeline.runtime.rng import generator
from pipeline.storage import atomic
from pipeline.storage.checkpoints import load_checkpoint, save_checkpoint
from pipeline.storage.records import from_json, to_json
from pipeline.training.train import train

#: of a baseline in training
CHECKPOINT = "checkpoint.safetensors"
#: parts of the budget after which a model is measured
_PARTS = 4
#: steps of the schedule, whatever the budget
_SCHEDULE = 10_000
#: batches of a block in the training that finds the seconds of a batch
_PROBE = 8
#: part of the budget, and the most seconds, that this training takes at least
_PROBE_PART, _PROBE_SECONDS = 0.03, 3.0


@dataclass(frozen=True)
class Checkpoint:
    """A model in training, to be measured.

    Attributes:
        model: with its averaged weights.
        seconds: of the optimiser so far.
        batches: so far.
    """

    model: DensityModel
    seconds: float
    batches: int


@dataclass(frozen=True)
class Trained:
    """A trained model.

    Attributes:
        model: with its averaged weights.
        seconds: of the optimiser's steps.
        overhead: further seconds of the call that trained it: samples are drawn and pushed through
            finished blocks, and blocks are measured.
        batches: of all blocks together.
        parameters: number of weights.
        width: hidden features of its networks.
        curve: what was measured on the way.
    """

    model: DensityModel
    seconds: float
    overhead: float
    batches: int
    parameters: int
    width: int
    curve: tuple[Point, ...]


#: measures a model in training; None where it cannot
Measure = Callable[[Checkpoint], Point | None]


@dataclass(frozen=True)
class Training:
    """How all models of a benchmark are trained.

    Attributes:
        budget: of each.
        parameters: the most that a model may have.
        accelerator: device; a single process.
        progress: wraps loops.
        paces: seconds of a batch by model, D and width, where a short training has found them.
    """

    budget: Budget
    parameters: int
    accelerator: Accelerator
    progress: Progress
    paces: dict[tuple[str, int, int], float] = field(default_factory=dict)

    def train(self, name: str, problem: Problem, folder: Path, measure: Measure) -> Trained:
        """Train a model.

        Args:
            name: a key of `pipeline.bench.models.TITLES`.
            problem: the data.
            folder: of the training's files.
            measure: is called with the model as it is after each part of the training.

        Raises:
            UserError: the budget is too small.
            JkoflowError: the training failed, or the number of parameters is too small.
        """
        width = width_for(name, problem.config, problem.source.shape, self.parameters)
        if name in BLOCKWISE:
            return self._train_blocks(name, width, problem, folder, measure)
        return self._train_baseline(name, width, problem, folder, measure)

    # ---------------------------------------------------------------- block by block

    def _train_blocks(
        self, name: str, width: int, problem: Problem, folder: Path, measure: Measure
    ) -> Trained:
        """Train jko, lfm, fm or segments by `pipeline.training`; a run that stopped goes on."""
        if (folder / CONFIG).is_file():
            config = read_config(folder)
        else:
            batches = self._batches(name, width, problem)
            config = blockwise_config(problem.config, name, width, batches)
        known = read_manifest(folder).passes if (folder / FILE).is_file() else ()
        spent = sum(row.seconds for each in known for row in each.blocks) + _begun(folder, known)
        elapsed = self._train_run(config, folder, True, problem)
        run = open_run(folder)
        run.flow.to(self.accelerator.device)
        *before, last = run.manifest.passes
        earlier = [row for whole in before for row in whole.blocks]
        seconds = sum(row.seconds for row in earlier)
        done, rows = float(sum(row.iterations for row in earlier)), last.blocks
        curve: list[Point | None] = []
        for count, row in enumerate(rows, start=1):
            seconds, done = seconds + row.seconds, done + row.iterations
            if count < len(rows):
                curve.append(measure(Checkpoint(FlowModel(run.flow[:count]), seconds, int(done))))
        remove_samples(folder)
        parameters = sum(row.parameters for row in rows)
        overhead = max(0.0, elapsed - (seconds - spent))
        return Trained(
            FlowModel(run.flow), seconds, overhead, int(done), parameters, width, _known(curve)
        )

    def _batches(self, name: str, width: int, problem: Problem) -> int:
        """Return the batches that the budget allows; a short training finds their seconds."""
        if self.budget.unit == "batches":
            return int(self.budget.amount)
        blocks = block_count(problem.config, name) * pass_count(as_jko(problem.config), name)
        key = (name, problem.dim, width)
        if key not in self.paces:
            self.paces[key] = self._pace(name, width, blocks, problem)
        return max(blocks, int(self.budget.amount / self.paces[key]))

    def _pace(self, name: str, width: int, blocks: int, problem: Problem) -> float:
        """Return the seconds of a batch, of a short training; of a longer one if it is over soon.

        The first batches of a training take longer, and a few fast ones measure little.
        """
        wanted = min(_PROBE_PART * self.budget.amount, _PROBE_SECONDS)
        seconds, done = self._probe(name, width, blocks * _PROBE, problem)
        if seconds < wanted:
            batches = int(wanted / seconds * done)
            seconds, done = self._probe(name, width, batches, problem)
        return seconds / done

    def _probe(self, name: str, width: int, batches: int, problem: Problem) -> tuple[float, int]:
        """Train for some batches in a scratch folder; return their seconds and number."""
        config = blockwise_config(problem.config, name, width, batches)
        with atomic.scratch_folder() as run:
            self._train_run(config, run, False, problem)
            rows = open_run(run).manifest.blocks
        return sum(row.seconds for row in rows), sum(row.iterations for row in rows)

    def _train_run(self, config: Config, folder: Path, resume: bool, problem: Problem) -> float:
        """Train a run, whose seconds are those of `used_seconds`; return all that it used."""
        clock = partial(used_seconds, self.accelerator.device)
        began = clock()
        source = problem.source
        train(config, folder, self.accelerator, self.progress, resume, source, clock=clock)
        return clock() - began

    # ---------------------------------------------------------------- all weights together

    def _train_baseline(
        self, name: str, width: int, problem: Problem, folder: Path, measure: Measure
    ) -> Trained:
        """Train a baseline with the optimiser, clipping and average of the blocks.

        A signal saves a checkpoint first, from which the same call goes on.
        """
        config, recipe = problem.config, problem.config.train
        device = self.accelerator.device
        settings = baseline_config(name, width, config.velocity.depth)
        weights = generator(recipe.seed, "bench", name, "weights")
        model = make_baseline(name, settings, problem.dim, weights).to(device)
        stage = problem.source.first_stage(folder, as_jko(config), self.accelerator)
        batches, average = batches_of(stage, config), Ema(model, recipe.ema)
        peak = problem.learning_rate
        optimizer = make_optimizer(recipe.optimizer, model, peak)
        path, saved = folder / CHECKPOINT, time.monotonic()
        seconds, done, curve = 0.0, 0, list[Point | None]()
        if path.is_file():
            state = load_checkpoint(path)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            average.load_state_dict(state["average"])
            seconds, done = state["seconds"], state["done"]
            curve = from_json(list[Point | None], state["curve"], str(path))

        def save() -> None:
            save_checkpoint(path, {
                "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                "average": average.state_dict(), "seconds": seconds, "done": done,
                "curve": to_json(curve),
            })  # fmt: skip

        with signals.deferred():
            while (spent := self.budget.spent(done, seconds)) < 1:
                if spent >= (len(curve) + 1) / _PARTS:
                    save()  # a measurement may take longer than a signal waits
                    curve.append(measure(Checkpoint(_averaged(model, average), seconds, done)))
                began = used_seconds(device)
                latents = generator(recipe.seed, "bench", "latents", done)
                z = batch_of(stage, batches.indices(done), latents).to(device)
                lr = warmup_cosine(
                    int(spent * _SCHEDULE), _SCHEDULE, peak=peak, final=recipe.lr_final, warmup=0
                ) * min(1.0, max((done + 1) / max(1, recipe.warmup), spent / WARMUP))
                set_learning_rate(optimizer, lr)
                noise = generator(recipe.seed, "bench", name, "noise", done)
                self._step(model, optimizer, z, noise, recipe.grad_clip, done)
                average.update(model)
                done, seconds = done + 1, seconds + used_seconds(device) - began
                if signals.pending() or time.monotonic() - saved > recipe.checkpoint_seconds:
                    save()
                    saved = time.monotonic()
                if signals.pending():
                    say(f"{TITLES[name]}: saved at batch {done:,}")
                    signals.raise_pending()
            save()
        remove_samples(folder)
        final = _averaged(model, average)
        return Trained(final, seconds, 0.0, done, model.parameter_count, width, _known(curve))

    @staticmethod
    def _step(
        model: DensityModel,
        optimizer: torch.optim.Adam | MuonAdam,
        z: torch.Tensor,
        noise: torch.Generator,
        clip: float,
        done: int,
    ) -> None:
        """Make one optimiser step.

        Raises:
            JkoflowError: the loss or its gradient is not finite, or an ODE cannot be solved.
        """
        optimizer.zero_grad(set_to_none=True)
        try:
            loss = model.loss(z, noise)
            loss.backward()
        except SolveError as error:
            raise JkoflowError(f"training failed at step {done}: {error}") from error
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip if clip > 0 else math.inf)
        value, size = float(loss.detach()), float(norm)
        if not (math.isfinite(value) and math.isfinite(size)):
            raise JkoflowError(
                f"training failed at step {done}: the loss is {value}, its gradient's norm "
                f"{size}; lower train.lr"
            )
        optimizer.step()


def _begun(folder: Path, passes: Sequence[Pass]) -> float:
    """Return the seconds of a block in training so far, which its checkpoint has.

    Args:
        folder: of the run.
        passes: of its manifest, whose blocks are finished.
    """
    finished = {
        folder / checkpoint_file(index, number)
        for number, each in enumerate(passes)
        for index in range(len(each.blocks))
    }
    begun = set((folder / checkpoint_file(0)).parent.glob("*.safetensors")) - finished
    return sum(float(load_checkpoint(path)["seconds"]) for path in begun)


def _averaged(model: DensityModel, average: Ema) -> DensityModel:
    """Return a copy of a model with its averaged weights."""
    shadow = copy.deepcopy(model).eval().requires_grad_(False)
    average.copy_to(shadow)
    shadow.refresh()
    return shadow


def _known(curve: Sequence[Point | None]) -> tuple[Point, ...]:
    """Return the points that could be measured."""
    return tuple(point for point in curve if point is not None)


def remove_samples(folder: Path) -> None:
    """Remove the training samples of a finished training, which its data set gives again."""
    shutil.rmtree(folder / "stages", ignore_errors=True)
