"""Diagnostics of a block: terms of its objective, movement, and its training grid.

All are measured on a fixed set of samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from flows.block import Block
from flows.errors import SolveError
from flows.networks.piecewise import aligned_steps
from flows.solving.estimators import make_divergence
from flows.solving.solver import FIXED_METHODS, SolverConfig
from pipeline.errors import JkoflowError
from pipeline.runtime.console import Progress, say
from pipeline.runtime.rng import Batches, generator
from pipeline.storage.training_log import TrainingLog
from pipeline.training.block_trainer import BlockTrainer

#: samples that a finished block is measured on
_SAMPLES = 4096
#: limit of velocity evaluations, over all samples, after a regression: a sampler of many steps
#: could take longer than the training. There is no limit under jko.
_MOST_EVALUATIONS = 16 * _SAMPLES
#: limit of evaluations times parameters after a regression: a minute or two on one core
_MOST_READS = 2**35
#: fewest samples after a regression
_LEAST_SAMPLES = 256
#: largest D whose divergence is exact
_EXACT_UP_TO = 16
#: samples on which grids are compared after the training of a block, and during it
_COMPARED, _COMPARED_IN_TRAINING = 256, 64
#: comparisons of grids during the training of a block, and least steps between two
_CHECKS, _LEAST_STEPS = 10, 100
#: least number of samples in a batch of a measurement
_BATCH = 64
#: largest difference of the objective between two grids without a warning, nats per dimension;
#: blocks of the packaged configurations differ by less than 0.001
TOLERANCE = 0.01
#: difference beyond which a block is discarded
HOPELESS = 1.0


@dataclass(frozen=True)
class Diagnostics:
    """Measurement of a block on a fixed set of samples.

    Attributes:
        terms: of its objective, nats per sample.
        moved: E‖T(z) − z‖² (squared_movement), its root (movement), and E‖T(z)‖² (squared_norm).
        error: mean squared distance per dimension to the map that the block was regressed on, by
            direction; None for a block that was trained on samples.
    """

    terms: dict[str, float]
    moved: Mapping[str, float]
    error: dict[str, float] | None = None


@torch.no_grad()
def measure(
    trainer: BlockTrainer,
    solver: SolverConfig,
    progress: Progress,
    samples: int = _SAMPLES,
    block: Block | None = None,
) -> Diagnostics:
    """Measure the terms of a block's objective, and its movement.

    The same samples are used for all blocks and passes, with an unbiased divergence. So the terms
    of all blocks add up to an estimate of the flow's NLL. Under objectives that integrate nothing,
    a fine grid or a large network reduces the number of samples.

    Args:
        trainer: of the block, finished or in training.
        solver: RK4 with 8 sub-intervals replaces an adaptive one.
        progress: wraps the loop over batches.
        samples: largest number of samples.
        block: with other weights; None takes the trainer's.

    Raises:
        JkoflowError: the block cannot be integrated.
    """
    block, recipe, device = block or trainer.block, trainer.recipe, trainer.accelerator.device
    divergence = make_divergence("exact" if block.velocity.dim <= _EXACT_UP_TO else "hutchinson")
    if solver.adaptive:
        steps = aligned_steps(block.velocity.smooth_pieces(), 8)
        solver = SolverConfig(method="rk4", steps=steps)
    stage = trainer.stage
    count = min(len(stage), _affordable(trainer, block, solver, samples))
    chosen = Batches(len(stage), count, recipe.seed, "measure").indices(0)
    source = generator(recipe.seed, "measure", trainer.index, *trainer.batches.salt)
    norm, log_det, moved = 0.0, 0.0, 0.0
    batches = chosen.split(max(_BATCH, recipe.batch_size))
    for rows in progress(batches, len(batches), f"measure block {trainer.index}"):
        z = stage.take("z", rows).float()
        eps = divergence.draw_probe(z, source)
        z = z.to(device)
        eps = None if eps is None else eps.to(device)
        condition = trainer.batches.condition(rows)
        try:
            end = block.transport(z, False, divergence, eps, solver, condition)
        except SolveError as error:
            raise JkoflowError(
                f"block {trainer.index} cannot be integrated ({error}); train elsewhere with a "
                "lower train.lr"
            ) from error
        assert end.log_det is not None
        norm += float(end.z.cpu().double().square().sum())
        log_det += float(end.log_det.cpu().double().sum())
        moved += float((end.z - z).cpu().double().square().sum())
    terms = {"potential": norm / 2 / count, "neg_log_det": -log_det / count}
    if trainer.spec.h is not None:
        terms["movement"] = moved / count / (2 * trainer.spec.h)
    terms = {"total": sum(terms.values()), **terms}
    squared = moved / count
    movement = {"movement": math.sqrt(squared), "squared_movement": squared}
    return Diagnostics(terms, {**movement, "squared_norm": norm / count})


def _affordable(trainer: BlockTrainer, block: Block, solver: SolverConfig, samples: int) -> int:
    """Limit a number of samples under objectives that integrate nothing."""
    if trainer.spec.objective == "jko":
        return samples
    weights = sum(p.numel() for p in block.parameters()) // trainer.spec.velocity.nets
    evaluations = min(_MOST_EVALUATIONS, _MOST_READS // weights)
    return min(samples, max(_LEAST_SAMPLES, evaluations // _evaluations(solver)))


def check_grid(
    trainer: BlockTrainer, sampler: SolverConfig, log: TrainingLog, progress: Progress
) -> None:
    """Compare a finished block's objective on its training grid with that on a finer grid.

    They differ where the block overfits the discretisation error of its grid. The sampler's grid
    may have the same error. So both are compared with RK4 of at least twice the evaluations. A
    difference beyond `TOLERANCE` is a warning on stderr; the log has the comparison in any case.

    Args:
        trainer: of the block, finished.
        sampler: the solver of the block in sampling; an adaptive one is not compared.
        log: of the run.
        progress: wraps loops.

    Raises:
        JkoflowError: the training grid's difference is beyond `HOPELESS`.
    """
    grid, index = trainer.block.solver, trainer.index
    if trainer.spec.objective != "jko" or grid.adaptive:
        return
    fine, dim = finer_grid(trainer, sampler), trainer.block.velocity.dim
    solvers = {"training_grid": grid, "sampler": sampler, "finer_grid": fine}
    if sampler.adaptive:
        del solvers["sampler"]
    objectives = {
        name: measure(trainer, solver, progress, samples=_COMPARED).terms["total"] / dim
        for name, solver in solvers.items()
    }
    reference = objectives["finer_grid"]
    differences = {name: abs(value - reference) for name, value in objectives.items()}
    differ = not all(difference <= TOLERANCE for difference in differences.values())
    event = "grids differ" if differ else "grids agree"
    log.write({"block": index, "step": trainer.done, "event": event, **objectives})
    if not differ:
        return
    sampled = ""
    if "sampler" in objectives:
        sampled = f" and {objectives['sampler']:.4f} with the sampler ({_name(sampler)})"
    finding = (
        f"block {index}'s objective is {objectives['training_grid']:.4f} nats per dimension on "
        f"its training grid ({_name(grid)}){sampled}, but {reference:.4f} on a finer grid "
        f"({_name(fine)}); "
    )
    if not differences["training_grid"] <= HOPELESS:
        raise JkoflowError(
            f"{finding}it overfits the discretisation error of its grid and is discarded; train "
            "elsewhere with velocity.autonomous=true, more jko.solver.steps, or fewer "
            "train.iterations"
        )
    remedy = "jko.solver.steps" if differences["training_grid"] > TOLERANCE else "sampler.steps"
    say(f"warning: {finding}raise {remedy}")


def overfits_grid(trainer: BlockTrainer, sampler: SolverConfig) -> bool:
    """Compare the grids of a block in training; return whether it has begun to overfit its own.

    The comparison is that of `check_grid`, with fewer samples and the present averaged weights.
    Weights without a difference beyond `TOLERANCE` are kept in the trainer. Without kept weights
    the result is False, so that a training never ends at its first comparison.

    Args:
        trainer: of the block.
        sampler: the solver of the block in sampling.

    Raises:
        JkoflowError: the block cannot be integrated, and there are no kept weights.
    """
    grid, dim = trainer.block.solver, trainer.block.velocity.dim
    block, few = trainer.snapshot(), _COMPARED_IN_TRAINING
    try:
        trained, reference = (
            measure(trainer, solver, _no_bar, few, block).terms["total"] / dim
            for solver in (grid, finer_grid(trainer, sampler))
        )
    except JkoflowError:  # a grid on which the field blows up differs from any other
        if not trainer.can_return:
            raise
        return True
    if abs(trained - reference) <= TOLERANCE:
        trainer.keep()
        return False
    return trainer.can_return


def compares_grids(trainer: BlockTrainer) -> bool:
    """Return whether the grids of a block in training are compared after its present step."""
    if trainer.spec.objective != "jko" or trainer.block.solver.adaptive:
        return False
    every = max(_LEAST_STEPS, trainer.iterations // _CHECKS)
    last = trainer.done == trainer.iterations and trainer.can_return
    return last or trainer.done % every == 0


def finer_grid(trainer: BlockTrainer, sampler: SolverConfig) -> SolverConfig:
    """Return RK4 with at least twice the evaluations of the training grid and a fixed sampler."""
    grids = [each for each in (trainer.block.solver, sampler) if not each.adaptive]
    most = max(_evaluations(each) for each in grids)
    steps = max(2, math.ceil(2 * most / FIXED_METHODS["rk4"]))
    steps = aligned_steps(trainer.block.velocity.smooth_pieces(), steps)
    most = FIXED_METHODS["rk4"] * steps
    return SolverConfig(method="rk4", steps=steps, max_evaluations=most)


def _no_bar(items: Iterable[Any], total: int, label: str) -> Iterable[Any]:
    return items


def _evaluations(solver: SolverConfig) -> int:
    return FIXED_METHODS[solver.method] * solver.steps


def _name(grid: SolverConfig) -> str:
    return f"{grid.method}, steps={grid.steps}"
