"""Which solver draws: the run's own, with what is asked for by hand, or within a budget."""

from __future__ import annotations

import dataclasses
from typing import Any

from flows.block import FIXED_METHODS, SolverConfig
from flows.pieces import aligned, fits
from pipeline.config import GenerateConfig
from pipeline.errors import UserError
from pipeline.guidance import way_of
from pipeline.runs import Run


def solver_of(run: Run, settings: GenerateConfig) -> SolverConfig:
    """The solver that samples: the run's `push`, with the overrides of `generate`."""
    solver = run.config.push
    if settings.method is not None:
        solver = dataclasses.replace(solver, method=settings.method)
    if settings.steps is not None:
        solver = dataclasses.replace(solver, steps=settings.steps)
    return solver


def solvers_of(run: Run, settings: GenerateConfig) -> list[SolverConfig]:
    """The solver of each block, data side first.

    Raises:
        UserError: `block_steps` has not one number a block, or the solver is adaptive.
        FlowError: steps below 1, or an unknown method.
    """
    solver, counts = solver_of(run, settings), settings.block_steps
    if counts is None:
        return [solver] * len(run.flow)
    if len(counts) != len(run.flow):
        raise UserError(
            f"steps for each block need one number a block, {len(run.flow)} for this run, not "
            f"{len(counts)}"
        )
    if solver.adaptive:
        raise UserError(
            f"steps for each block need a fixed-step solver, not {solver.method}; choose --method "
            "rk4, midpoint or euler"
        )
    return [dataclasses.replace(solver, steps=count) for count in counts]


def plain_solvers(solvers: list[SolverConfig]) -> list[dict[str, Any]]:
    """Method and steps, or tolerances, of each block's solver; one for all where they agree."""
    rows = [
        {"method": each.method}
        | ({"rtol": each.rtol, "atol": each.atol} if each.adaptive else {"steps": each.steps})
        for each in solvers
    ]
    return rows[:1] if all(row == rows[0] for row in rows) else rows


def with_solver(
    settings: GenerateConfig, steps: str | None = None, method: str | None = None
) -> GenerateConfig:
    """The settings with what `--steps` and `--method` say; None leaves either as it is.

    Args:
        settings: of the run.
        steps: one number for all blocks, or one a block separated by commas.
        method: a solver.

    Raises:
        UserError: steps are not whole numbers.
    """
    if method is not None:
        settings = dataclasses.replace(settings, method=method)
    if steps is None:
        if method is not None and method not in FIXED_METHODS:  # which has no use for steps
            settings = dataclasses.replace(settings, block_steps=None)
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


def within(run: Run, settings: GenerateConfig, nfe: int) -> GenerateConfig:
    """The settings with as many sub-intervals a block as a budget of evaluations allows.

    Raises:
        UserError: the budget does not reach one step a network, or the solver is adaptive.
    """
    solver = solver_of(run, settings)
    if solver.adaptive:
        raise UserError(
            f"--nfe needs a fixed-step solver, but generate.method is {solver.method}; choose "
            "--method rk4, midpoint or euler"
        )
    way = way_of(run, settings)
    twice = way.evaluations  # guidance evaluates a network twice
    refined = 0 if way.refiner is None else way.refiner.nfe()
    per_step = FIXED_METHODS[solver.method] * len(run.flow) * twice
    pieces = [block.velocity.pieces() for block in way.flow]
    for steps in range((nfe - refined) // per_step, 0, -1):
        if all(fits(each, steps) for each in pieces):  # with several networks a block, not any S
            return dataclasses.replace(settings, steps=steps, block_steps=None)
    least = max(aligned(each, 1) for each in pieces)
    place = f"{len(run.flow)} blocks" + (f" of {least} networks" if least > 1 else "")
    place += " with guidance" * (twice > 1) + " and a refiner" * (refined > 0)
    raise UserError(
        f"--nfe {nfe} is below one {solver.method} step in each of {place} "
        f"({per_step * least + refined}); ask for more, or choose --method euler"
    )
