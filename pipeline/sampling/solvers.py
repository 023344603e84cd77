"""Solvers that sample: those of the run's configuration, of the command line, or of a budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from flows.networks.base import SmoothPiece
from flows.networks.piecewise import aligned_steps, is_aligned
from flows.solving.solver import FIXED_METHODS, SolverConfig
from pipeline.errors import UserError
from pipeline.runs.run import Run


def solvers_of(run: Run) -> list[SolverConfig]:
    """Return the solver of each block of a run, data side first; FlowError if one is invalid."""
    return run.config.sampler.of_blocks(len(run.flow))


def method_of(solvers: Sequence[SolverConfig]) -> str:
    """Return the method of all blocks, or one for each block, as `--method` takes it."""
    names = [each.method for each in solvers]
    return names[0] if len(set(names)) == 1 else ",".join(names)


def solver_identity(solver: SolverConfig) -> dict[str, Any]:
    """Return the method with its steps, if it is not adaptive, as JSON values."""
    if solver.adaptive:
        return {"method": solver.method}
    return {"method": solver.method, "steps": solver.steps}


def with_solver(run: Run, steps: str | None = None, method: str | None = None) -> Run:
    """Return the run with the solvers of `--steps` and `--method`; None leaves either unchanged.

    Each is one value for all blocks, or one per block separated by commas.

    Raises:
        UserError: steps are not whole numbers, a method's name is missing, there is not one value
            per block, or no method takes steps.
        FlowError: too many steps, or an unknown method.
    """
    sampler = run.config.sampler
    if method is not None:
        names = [part.strip() for part in method.split(",")]
        if not all(names):
            raise UserError(
                f"--method takes a solver, or several separated by commas, not {method!r}"
            )
        _require_one_each("--method", names, run)
        sampler = dataclasses.replace(sampler, method=names[0] if len(names) == 1 else names)
    if steps is not None:
        counts = whole_numbers("--steps", steps)
        _require_one_each("--steps", counts, run)
        sampler = dataclasses.replace(sampler, steps=counts[0] if len(counts) == 1 else counts)
    changed = dataclasses.replace(run, config=dataclasses.replace(run.config, sampler=sampler))
    solvers = solvers_of(changed)
    if steps is not None and all(solver.adaptive for solver in solvers):
        raise UserError(
            f"--steps needs a fixed-step solver, not {method_of(solvers)}; choose --method rk4, "
            "midpoint or euler"
        )
    return changed


def _require_one_each(option: str, values: Sequence[object], run: Run) -> None:
    """Refuse a list that has not one value per block."""
    if len(values) not in (1, len(run.flow)):
        raise UserError(
            f"{option} takes one value, or one per block, {len(run.flow)} for this run, not "
            f"{len(values)}"
        )


def whole_numbers(name: str, text: str) -> list[int]:
    """Read numbers of at least 1 separated by commas; UserError for something else."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise UserError(
            f"{name} takes a whole number of at least 1, or several separated by commas, not "
            f"{text!r}"
        )
    return [int(part) for part in parts]


def budget_steps(
    nfe: int,
    solvers: Sequence[SolverConfig],
    pieces: Sequence[tuple[SmoothPiece, ...]],
    networks: int,
    refiner_nfe: int,
) -> int:
    """Return the most solver steps a block for at most `nfe` network evaluations per sample.

    `pieces` are those of each block's velocity field, whose evaluation takes `networks` network
    evaluations. The refiner takes `refiner_nfe` of the budget.

    Raises:
        UserError: the budget is too small for one step, or a solver is adaptive.
    """
    method = method_of(solvers)
    if any(solver.adaptive for solver in solvers):
        raise UserError(
            f"--nfe needs a fixed-step solver, not {method}; choose --method rk4, midpoint or "
            "euler"
        )
    per_step = sum(FIXED_METHODS[solver.method] for solver in solvers) * networks
    for steps in range((nfe - refiner_nfe) // per_step, 0, -1):
        if all(is_aligned(each, steps) for each in pieces):  # a node at every switch
            return steps
    least = max(aligned_steps(each, 1) for each in pieces)
    place = "the block" if len(solvers) == 1 else f"each of {len(solvers)} blocks"
    place += f" of {least} networks" if least > 1 else ""
    place += " with guidance" * (networks > 1) + " and a refiner" * (refiner_nfe > 0)
    raise UserError(
        f"--nfe {nfe} is below one {method} step in {place} "
        f"({per_step * least + refiner_nfe}); ask for more, or choose --method euler"
    )
