"""Notices a block that is good only on the grid it was trained on.

Training integrates on few sub-intervals, and the objective is differentiated through them: a
block may learn a field whose error on that grid lowers the objective. On a finer grid, or an
adaptive one, the same field is then worth less.
"""

from __future__ import annotations

from flows.block import FIXED_METHODS, SolverConfig
from pipeline.blocks import BlockTrainer
from pipeline.errors import JkoflowError
from pipeline.journal import Journal
from pipeline.latents import Progress
from pipeline.measuring import measure
from pipeline.store import StoreReader
from pipeline.terminal import say

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
        f"grid ({_name(grid)}), but {pushed:.4f} with the push solver ({_name(push)}); "
    )
    if not abs(trained - pushed) <= HOPELESS:
        raise JkoflowError(
            f"{told}it has learnt the error of its grid and is not kept; train elsewhere with "
            "train.jacobian_weight (such as 0.05, with train.divergence=finite-difference), "
            "train.warm_start=false, train.max_substeps (such as 16), fewer iterations, or more "
            "solver.steps"
        )
    finer = push.adaptive or _evaluations(push) > _evaluations(grid)
    remedy = "raise solver.steps (or train.max_substeps)" if finer else "raise push.steps"
    say(f"warning: {told}{remedy}")
    return True


def _evaluations(solver: SolverConfig) -> int:
    return FIXED_METHODS[solver.method] * solver.steps


def _name(solver: SolverConfig) -> str:
    return solver.method if solver.adaptive else f"{solver.method}, steps={solver.steps}"
