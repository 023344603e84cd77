"""Which solver draws: the run's own, with what is asked for by hand, or within a budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from flows.networks.base import SmoothPiece
from flows.networks.piecewise import aligned_steps, is_aligned
from flows.solving.solver import FIXED_METHODS, SolverConfig
from pipeline.config.schema import GenerateConfig
from pipeline.errors import UserError
from pipeline.runs.run import Run


def solver_of(run: Run, settings: GenerateConfig) -> SolverConfig:
    """Return the solver that samples: the run's `push` with the overrides of `generate`.

    Raises:
        FlowError: steps below 1, or an unknown method.
    """
    solver = run.config.push
    if settings.method is not None:
        solver = dataclasses.replace(solver, method=settings.method)
    if settings.steps is not None:
        solver = dataclasses.replace(solver, steps=settings.steps)
    return solver


def solvers_of(run: Run, settings: GenerateConfig) -> list[SolverConfig]:
    """Return the solver of each block, data side first.

    Where some blocks have adaptive solvers, their numbers of steps are ignored.

    Raises:
        UserError: `block_methods` has not one name a block, or `block_steps` not one number, or
            all solvers are adaptive where steps are given for each.
        FlowError: steps below 1, or an unknown method.
    """
    names, counts, blocks = settings.block_methods, settings.block_steps, len(run.flow)
    if names is None:
        solvers = [solver_of(run, settings)] * blocks
    else:
        if len(names) != blocks:
            raise UserError(
                f"methods for each block need one name a block, {blocks} for this run, not "
                f"{len(names)}"
            )
        solvers = [solver_of(run, dataclasses.replace(settings, method=name)) for name in names]
    if counts is None:
        return solvers
    if len(counts) != blocks:
        raise UserError(
            f"steps for each block need one number a block, {blocks} for this run, not "
            f"{len(counts)}"
        )
    if all(each.adaptive for each in solvers):
        raise UserError(
            f"steps for each block need a fixed-step solver, not {method_of(solvers)}; choose "
            "--method rk4, midpoint or euler"
        )
    return [
        each if each.adaptive else dataclasses.replace(each, steps=count)
        for each, count in zip(solvers, counts, strict=True)
    ]


def method_of(solvers: Sequence[SolverConfig]) -> str:
    """Return the method of all blocks, or one for each block, as `--method` takes it."""
    names = [each.method for each in solvers]
    return names[0] if len(set(names)) == 1 else ",".join(names)


def solver_identity(solver: SolverConfig) -> dict[str, Any]:
    """Return the method with its steps or, of an adaptive one, its tolerances, as JSON values."""
    if solver.adaptive:
        return {"method": solver.method, "rtol": solver.rtol, "atol": solver.atol}
    return {"method": solver.method, "steps": solver.steps}


def with_solver(
    settings: GenerateConfig, steps: str | None = None, method: str | None = None
) -> GenerateConfig:
    """Return the settings with the values of `--steps` and `--method`; None changes nothing.

    Args:
        settings: of the run.
        steps: one number for all blocks, or one a block separated by commas.
        method: one solver for all blocks, or one a block separated by commas.

    Raises:
        UserError: steps are not whole numbers, or a solver's name is missing.
    """
    if method is not None:
        names = [part.strip() for part in method.split(",")]
        if not all(names):
            raise UserError(
                f"--method takes a solver, or several separated by commas, not {method!r}"
            )
        one, several = (names[0], None) if len(names) == 1 else (None, names)
        settings = dataclasses.replace(settings, method=one, block_methods=several)
        if steps is None and not any(name in FIXED_METHODS for name in names):
            settings = dataclasses.replace(settings, block_steps=None)  # none has a use for them
    if steps is None:
        return settings
    counts = whole_numbers("--steps", steps)
    if len(counts) == 1:
        return dataclasses.replace(settings, steps=counts[0], block_steps=None)
    return dataclasses.replace(settings, steps=None, block_steps=counts)


def whole_numbers(name: str, text: str) -> list[int]:
    """Numbers of at least 1 separated by commas.

    Raises:
        UserError: something else.
    """
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
    """Return the largest number of solver steps a block that a budget of evaluations allows.

    Args:
        nfe: the largest number of network evaluations per sample.
        solvers: the solver of each block, on fixed grids.
        pieces: the pieces of each block's velocity field.
        networks: network evaluations that one evaluation of the velocity field takes.
        refiner_nfe: network evaluations of the refiner per sample.

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
    place = f"{len(solvers)} blocks" + (f" of {least} networks" if least > 1 else "")
    place += " with guidance" * (networks > 1) + " and a refiner" * (refiner_nfe > 0)
    raise UserError(
        f"--nfe {nfe} is below one {method} step in each of {place} "
        f"({per_step * least + refiner_nfe}); ask for more, or choose --method euler"
    )
