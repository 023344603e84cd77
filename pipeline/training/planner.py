"""Plans the passes of a run, as pure functions of the configuration and the passes so far."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, TypeVar

from flows.objectives.schedule import refined_steps, reparameterize, step_sizes
from pipeline.config.keys import resume_rule
from pipeline.config.plain import to_dict
from pipeline.config.rules.validate import ends_free, objective_of, steps
from pipeline.config.schema import SECTIONS, Config
from pipeline.config.training import JkoConfig
from pipeline.config.values import of_block
from pipeline.errors import UserError
from pipeline.runs.passes import BlockRow, Pass, splits

Number = TypeVar("Number", int, float)

def next_pass(config: Config, passes: Sequence[Pass], add_blocks: int = 0) -> Pass | None:
    """Plan the next pass: an unfinished one, one asked for, or one that the schedule wants.

    Args:
        config: the configuration.
        passes: of the run so far, in order.
        add_blocks: number of blocks to add; 0 for none.

    Returns:
        the last of `passes` itself if it is unfinished; None if no pass is left to train.

    Raises:
        UserError: the run cannot add blocks or be split as the configuration says.
    """
    last = passes[-1] if passes else None
    if add_blocks:
        return last if adds(last, add_blocks) else _add(config, passes, add_blocks)
    if last is None:
        return _ordinary(config)
    if not last.complete:
        return last
    if config.jko is None:
        return None
    if last.reparameterized < config.jko.reparameterize:
        return _reparameterize(config, config.jko, passes)
    split = splits(passes, len(passes) - 1)
    if split < config.jko.refine:
        return _refine(config, config.jko, passes, split)
    return None


def with_lower_iterations(config: Config, passes: Sequence[Pass]) -> tuple[Pass, ...]:
    """Return the passes with the lower `train.iterations` of a configuration.

    Blocks of an unfinished pass that are not finished take them. Other settings stay.
    """
    last = passes[-1] if passes else None
    if last is None or last.complete:
        return tuple(passes)
    if last.own and config.jko is not None and config.jko.later_iterations is not None:
        return tuple(passes)
    wanted = [
        of_block(config.train.iterations, last.parent(index)[0] if last.own else index)
        for index in range(len(last.iterations))
    ]
    finished = len(last.blocks)
    lower = [*last.iterations[:finished], *map(min, last.iterations[finished:], wanted[finished:])]
    if lower == last.iterations:
        return tuple(passes)
    recipe = {**last.recipe, "iterations": config.train.iterations}
    return (*passes[:-1], dataclasses.replace(last, iterations=lower, recipe=recipe))


def _ordinary(config: Config) -> Pass:
    planned, free = steps(config), ends_free(config)
    count = len(planned) + free
    plan = Pass(
        "ordinary",
        [],
        free,
        None if config.schedule is None else config.schedule.tolerance,
        *_efforts(config, count),
        recipe=recipe_of(config),
    )
    return _with_steps(plan, planned, objective_of(config))


def _with_steps(plan: Pass, planned: list[float], objective: str) -> Pass:
    """Return the plan with the steps of its blocks: h under jko, γ under lfm."""
    if objective == "jko":
        return dataclasses.replace(plan, objective=objective, h=planned)
    return dataclasses.replace(plan, objective=objective, gamma=planned)


def _reparameterize(config: Config, jko: JkoConfig, passes: Sequence[Pass]) -> Pass:
    rows = passes[-1].blocks
    movements = [row.movement for row in rows if row.h is not None and row.movement is not None]
    h = reparameterize(_step_sizes(rows), movements, jko.eta, jko.h_max)
    return _later("reparameterize", config, jko, passes, h, 1)


def _refine(config: Config, jko: JkoConfig, passes: Sequence[Pass], split: int) -> Pass:
    wanted = jko.refine
    if wanted % split:
        raise UserError(
            f"--refine is {wanted}, but the blocks are split into {split} already; "
            f"give --refine a multiple of {split}"
        )
    parts = wanted // split
    h = refined_steps(_step_sizes(passes[-1].blocks), parts)
    return _later("refine", config, jko, passes, h, parts)


def _step_sizes(rows: Sequence[BlockRow]) -> list[float]:
    """Return h of the blocks with a movement term."""
    return [row.h for row in rows if row.h is not None]


def _later(
    kind: str, config: Config, jko: JkoConfig, passes: Sequence[Pass], h: list[float], parts: int
) -> Pass:
    """Plan a pass in which every block continues its training."""
    before = passes[-1].blocks
    if not h:
        raise UserError(
            f"this flow has no block with a movement term; a {kind} pass needs some; train one "
            "under train.objective=jko"
        )
    solved = [row.spec.solver.steps for row in before if row.h is not None]
    substeps = [math.ceil(steps / parts) for steps in solved for _ in range(parts)]
    substeps += [row.spec.solver.steps for row in before if row.h is None]
    iterations, _, rates = _efforts(config, len(before))
    iterations = _for_children(iterations, len(solved), parts)
    if jko.later_iterations is not None:
        iterations = [jko.later_iterations] * len(iterations)
    return Pass(
        kind,
        h,
        len(before) > len(solved),
        None,
        iterations,
        substeps,
        _for_children(rates, len(solved), parts),
        base=len(passes) - 1,
        parts=parts,
        own=True,
        reparameterized=passes[-1].reparameterized + (kind == "reparameterize"),
        recipe=recipe_of(config),
    )


def adds(last: Pass | None, count: int) -> bool:
    """Return whether the last pass is an unfinished one that adds this number of blocks."""
    if last is None or last.complete or last.kind != "add":
        return False
    return len(last.steps) - last.kept == count


def _add(config: Config, passes: Sequence[Pass], count: int) -> Pass:
    if count < 1:
        raise UserError(f"--add-blocks must be at least 1, not {count}")
    last = passes[-1] if passes else None
    if last is None or not last.complete:
        raise UserError(
            "this run is unfinished; blocks are added to a finished run; finish it with --resume"
        )
    _same_objective(config, last)
    if config.train.objective == "fm":
        raise UserError(
            "a run under train.objective=fm has one block; add blocks to a run under lfm or jko"
        )
    kept = tuple(row for row in last.blocks if row.step is not None)
    planned = [row.step for row in kept if row.step is not None]
    explicit, first, limit = _growth(config)
    listed = explicit[len(planned) : len(planned) + count]
    planned += listed
    if len(listed) < count:
        assert config.schedule is not None  # fm is refused above
        rho = config.schedule.rho
        if planned:
            first = planned[-1] * rho
        planned += step_sizes(first, rho, limit, count - len(listed))
    free = len(last.blocks) > len(kept)
    plan = Pass(
        "add",
        [],
        free,
        None,
        *_efforts(config, len(planned) + free),
        base=len(passes) - 1,
        kept=len(kept),
        reparameterized=last.reparameterized,
        recipe=recipe_of(config),
        blocks=kept,
    )
    return _with_steps(plan, planned, last.objective)


def _growth(config: Config) -> tuple[list[float], float, float]:
    """Return the explicit steps, the first step and the largest step: h_k, or γ_k under lfm."""
    if config.jko is not None:
        return config.jko.h or [], config.jko.h0, config.jko.h_max
    assert config.lfm is not None
    return config.lfm.gamma or [], config.lfm.gamma1, math.inf


def _same_objective(config: Config, last: Pass) -> None:
    if objective_of(config) != last.objective:
        raise UserError(
            f"the blocks of this run were trained under {last.objective}, not "
            f"{config.train.objective}; keep the objective, or train elsewhere with --run"
        )


def recipe_of(config: Config) -> dict[str, Any]:
    """Return the settings that decide the weights: section train and those of the objective."""
    plain = to_dict(config)
    free = {key for key in plain["train"] if resume_rule(f"train.{key}", Config) == "free"}
    train = {key: value for key, value in plain["train"].items() if key not in free}
    return {**train, **{name: plain[name] for name in SECTIONS if name in plain}}


def _efforts(config: Config, count: int) -> tuple[list[int], list[int], list[float]]:
    """Return optimiser steps, sub-intervals and peak learning rate of each block.

    The sub-intervals are those of the training solver under jko, else those of the sampler.
    """
    substeps = config.sampler.steps if config.jko is None else config.jko.solver.steps
    return (
        [of_block(config.train.iterations, index) for index in range(count)],
        [of_block(substeps, index) for index in range(count)],
        [of_block(config.train.lr, index) for index in range(count)],
    )


def _for_children(values: list[Number], split: int, parts: int) -> list[Number]:
    """Repeat the values of the first `split` blocks, which are split into children."""
    return [value for value in values[:split] for _ in range(parts)] + values[split:]
