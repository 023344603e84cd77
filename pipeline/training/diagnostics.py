"""What a finished block does to a fixed set of samples: terms of its objective, and movement."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from flows.errors import SolveError
from flows.networks.piecewise import aligned_steps
from flows.solving.estimators import make_divergence
from flows.solving.solver import FIXED_METHODS, SolverConfig
from pipeline.errors import JkoflowError
from pipeline.runtime.console import Progress, say
from pipeline.runtime.rng import Batches, generator
from pipeline.storage.shards import StoreReader
from pipeline.storage.training_log import Journal
from pipeline.training.block_trainer import BlockTrainer

#: samples that a finished block is measured on
_MEASURED = 4096
#: evaluations of the velocity, over all samples, that measuring may take after a regression, where
#: a push solver of many steps would take longer than the training; JKO's blocks get all samples
_AFFORDED = 16 * _MEASURED
#: likewise, times the parameters that an evaluation reads: a minute or two of one core
_AFFORDED_READS = 2**35
#: fewest samples all the same
_AT_LEAST = 256
#: largest D whose divergence is measured exactly
_EXACT_UP_TO = 16


@dataclass(frozen=True)
class Measured:
    """What a finished block does to a fixed set of samples.

    Attributes:
        terms: of its objective, nats per sample.
        moved: E‖T(z) − z‖² (squared_movement), its root (movement), and E‖T(z)‖² (squared_norm).
    """

    terms: dict[str, float]
    moved: dict[str, float]


@torch.no_grad()
def measure(
    trainer: BlockTrainer, stage: StoreReader, push: SolverConfig, progress: Progress
) -> Measured:
    """The terms of a finished block's objective, and its movement, on a fixed set of samples.

    The same samples are followed through all blocks and passes, on the grid that pushes, with an
    unbiased divergence; so the terms of all blocks add up to an estimate of the flow's NLL. Under
    objectives that integrate nothing there are fewer samples where the grid is fine or the network
    large.

    Args:
        trainer: of the block, finished.
        stage: the samples before the block.
        push: the solver; a fixed grid stands in for an adaptive one.
        progress: wraps the loop over batches.
    """
    block, recipe, device = trainer.block, trainer.recipe, trainer.accelerator.device
    divergence = make_divergence("exact" if block.velocity.dim <= _EXACT_UP_TO else "hutchinson")
    steps = aligned_steps(block.velocity.smooth_pieces(), 8)
    solver = SolverConfig(method="rk4", steps=steps) if push.adaptive else push
    count = min(len(stage), _MEASURED)
    if trainer.spec.objective != "jko":
        each = FIXED_METHODS[solver.method] * solver.steps
        weights = sum(p.numel() for p in block.parameters()) // trainer.spec.velocity.nets
        afforded = min(_AFFORDED, _AFFORDED_READS // weights)
        count = min(count, max(_AT_LEAST, afforded // each))
    chosen = Batches(len(stage), count, recipe.seed, "measure").indices(0)
    drawn = generator(recipe.seed, "measure", trainer.index, *trainer.salt)
    norm, log_det, moved = 0.0, 0.0, 0.0
    batches = chosen.split(recipe.batch_size)
    for rows in progress(batches, len(batches), f"measure block {trainer.index}"):
        z = stage.take("z", rows).float()
        eps = divergence.draw_probe(z, drawn)
        z = z.to(device)
        eps = None if eps is None else eps.to(device)
        of = trainer.condition(rows)
        try:
            end = block.transport(z, False, divergence, eps, solver, of)
        except SolveError as error:
            raise JkoflowError(
                f"block {trainer.index} cannot be measured: {error}; start a new "
                "run with a lower train.lr"
            ) from error
        assert end.log_det is not None
        norm += float(end.z.double().square().sum())
        log_det += float(end.log_det.double().sum())
        moved += float((end.z - z).double().square().sum())
    terms = {"potential": norm / 2 / count, "neg_log_det": -log_det / count}
    if trainer.spec.h is not None:
        terms["movement"] = moved / count / (2 * trainer.spec.h)
    terms = {"total": sum(terms.values()), **terms}
    squared = moved / count
    return Measured(
        terms,
        {
            "movement": math.sqrt(squared),
            "squared_movement": squared,
            "squared_norm": norm / count,
        },
    )


#: largest difference between the two objectives that is let pass, in nats per dimension; blocks
#: of the packaged configurations differ by less than 0.001
TOLERANCE = 0.01


#: difference beyond which the block is worthless: what follows would be trained on rubbish
HOPELESS = 1.0


def check_grid(
    trainer: BlockTrainer,
    stage: StoreReader,
    push: SolverConfig,
    pushed: float,
    journal: Journal,
    progress: Progress,
) -> bool:
    """Compare a finished block's objective on its training grid with that of the push solver.

    A difference beyond `TOLERANCE` is told on stderr and in the log, and training goes on; one
    beyond `HOPELESS` ends it.

    Args:
        trainer: of the block, finished.
        stage: the samples before the block.
        push: the solver that pushes.
        pushed: the objective with it, nats per sample, as `measure` gives it.
        journal: the run's log.
        progress: wraps loops.

    Returns:
        Whether there was anything to warn of.

    Raises:
        JkoflowError: the difference is beyond `HOPELESS`.
    """
    grid, index = trainer.block.solver, trainer.index
    if trainer.spec.objective != "jko" or grid.adaptive or grid == push:
        return False
    dim = trainer.block.velocity.dim
    trained, pushed = measure(trainer, stage, grid, progress).terms["total"] / dim, pushed / dim
    if abs(trained - pushed) <= TOLERANCE:
        return False
    row = {"block": index, "step": trainer.done, "event": "grids differ"}
    journal.write({**row, "training_grid": trained, "push_solver": pushed})
    told = (
        f"block {index}'s objective is {trained:.4f} nats per dimension on its training "
        f"grid ({_name(grid)}), but {pushed:.4f} with the sampler ({_name(push)}); "
    )
    if not abs(trained - pushed) <= HOPELESS:
        raise JkoflowError(
            f"{told}it has learnt the error of its grid and is not kept; train elsewhere with "
            "jko.jacobian_weight (such as 0.05, with jko.divergence=finite-difference), "
            "train.warm_start=false, fewer train.iterations, or more jko.solver.steps"
        )
    finer = push.adaptive or _evaluations(push) > _evaluations(grid)
    remedy = "raise jko.solver.steps" if finer else "raise sampler.steps"
    say(f"warning: {told}{remedy}")
    return True


def _evaluations(solver: SolverConfig) -> int:
    return FIXED_METHODS[solver.method] * solver.steps


def _name(solver: SolverConfig) -> str:
    return solver.method if solver.adaptive else f"{solver.method}, steps={solver.steps}"
