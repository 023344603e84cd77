"""Plans the passes of a run: pure functions of the configuration and of the passes so far."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, TypeVar

from flows.objectives.schedule import refined_steps, reparameterize, step_sizes
from pipeline.config.load import to_dict
from pipeline.config.schema import Config
from pipeline.config.validate import ends_free, objective_of, steps
from pipeline.errors import UserError
from pipeline.runs.passes import Pass, step_of

Number = TypeVar("Number", int, float)

#: keys of the train section that do not decide the weights
INDIFFERENT = ("max_minutes", "checkpoint_seconds", "log_every")


#: what is of a schedule's steps, and what of their number alone
_COUNT = frozenset(f"schedule.{key}" for key in ("max_blocks", "tolerance", "free_block"))
_SCHEDULE = _COUNT | {f"schedule.{key}" for key in ("h", "h0", "rho", "h_max", "gamma", "gamma1")}


def next_pass(
    config: Config,
    passes: Sequence[Pass],
    add_blocks: int = 0,
    from_block: int | None = None,
    altered: Sequence[str] = (),
) -> Pass | None:
    """The pass to be trained now: an unfinished one, one asked for, or one the schedule wants.

    Args:
        config: the configuration.
        passes: of the run so far, in order.
        add_blocks: blocks to be added, 0 for none.
        from_block: the first block to be trained again; None trains none again.
        altered: keys that decide the weights and differ from those of the run so far.

    Returns:
        The last of `passes` itself if it goes on; None if nothing is left to do.

    Raises:
        UserError: a request that the run cannot meet.
    """
    if add_blocks and from_block is not None:
        raise UserError("give either --add-blocks or --from-block, not both")
    last = passes[-1] if passes else None
    if from_block is not None:
        fresh = _retrain(config, passes, from_block, altered)
        unfinished = last is not None and not last.complete
        going_on = unfinished and not altered and _same_plan(passes[-1], fresh)
        return last if going_on else fresh
    if add_blocks:
        return _add(config, passes, add_blocks, altered)
    if last is None:
        return _ordinary(config)
    if not last.complete:
        return last
    if last.reparameterized < config.schedule.reparameterize:
        return _reparameterize(config, passes)
    if _split(passes) < config.schedule.refine:
        return _refine(config, passes, _split(passes))
    return None


def _ordinary(config: Config) -> Pass:
    planned, free = steps(config), ends_free(config)
    count = len(planned) + free
    plan = Pass(
        "ordinary",
        [],
        free,
        config.schedule.tolerance,
        *_efforts(config, count),
        recipe=_recipe(config),
        lr=_rates(config, count),
    )
    return _with_steps(plan, planned, objective_of(config))


def _with_steps(plan: Pass, planned: list[float], objective: str) -> Pass:
    """The plan with the steps of its blocks, h or γ, where its objective has them."""
    if objective == "jko":
        return dataclasses.replace(plan, objective=objective, h=planned)
    return dataclasses.replace(plan, objective=objective, gamma=planned)


def _reparameterize(config: Config, passes: Sequence[Pass]) -> Pass:
    schedule = config.schedule
    rows = [row for row in passes[-1].blocks if row["h"] is not None]
    h = reparameterize(
        [row["h"] for row in rows],
        [row["movement"] for row in rows],
        schedule.eta,
        schedule.h_max,
    )
    return _later("reparameterize", config, passes, h, 1)


def _refine(config: Config, passes: Sequence[Pass], split: int) -> Pass:
    wanted = config.schedule.refine
    if wanted % split:
        raise UserError(
            f"the blocks are split into {split} already, which does not divide {wanted}; "
            f"give --refine a multiple of {split}"
        )
    parts = wanted // split
    rows = [row for row in passes[-1].blocks if row["h"] is not None]
    h = refined_steps([row["h"] for row in rows], parts)
    return _later("refine", config, passes, h, parts)


def _later(kind: str, config: Config, passes: Sequence[Pass], h: list[float], parts: int) -> Pass:
    """A pass in which every block trains on from its own weights."""
    before = passes[-1].blocks
    if not h:
        raise UserError(f"a {kind} pass needs blocks with a movement term; this flow has none")
    solved = [row["spec"]["solver"]["steps"] for row in before if row["h"] is not None]
    substeps = [math.ceil(steps / parts) for steps in solved for _ in range(parts)]
    substeps += [row["spec"]["solver"]["steps"] for row in before if row["h"] is None]
    spent = _for_children(_efforts(config, len(before))[0], len(solved), parts)
    if config.schedule.later_iterations is not None:
        spent = [config.schedule.later_iterations] * len(spent)
    return Pass(
        kind,
        h,
        len(before) > len(solved),
        None,
        spent,
        substeps,
        base=len(passes) - 1,
        parts=parts,
        own=True,
        reparameterized=passes[-1].reparameterized + (kind == "reparameterize"),
        recipe=_recipe(config),
        lr=_for_children(_rates(config, len(before)), len(solved), parts),
    )


def _add(config: Config, passes: Sequence[Pass], count: int, altered: Sequence[str]) -> Pass:
    if count < 1:
        raise UserError(f"--add-blocks must be at least 1, not {count}")
    last = passes[-1] if passes else None
    if last is not None and not last.complete and last.kind == "add":
        if len(last.steps) - last.kept == count:
            if altered:
                raise UserError(
                    f"the blocks that are being added were begun with another {altered[0]}; "
                    "finish them as they were begun (--resume), then add more"
                )
            return last
    if last is None or not last.complete:
        raise UserError("blocks can be added to a finished run only; finish it with --resume")
    _same_objective(config, last)
    _ignored(altered, _COUNT, "--add-blocks adds as many as it says, and a free one where one was")
    if config.train.objective == "fm":
        raise UserError("flow matching has one block; add blocks under train.objective=lfm or jko")
    rows = [(row, step_of(row)) for row in last.blocks]
    kept = [row for row, step in rows if step is not None]
    planned = [step for _, step in rows if step is not None]
    schedule, jko = config.schedule, last.objective == "jko"
    given = ((schedule.h if jko else schedule.gamma) or [])[len(planned) : len(planned) + count]
    planned += [float(step) for step in given]
    if len(given) < count:
        first = schedule.h0 if jko else schedule.gamma1
        if planned:
            first = planned[-1] * schedule.rho
        limit = schedule.h_max if jko else math.inf
        planned += step_sizes(first, schedule.rho, limit, count - len(given))
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
        recipe=_recipe(config),
        lr=_rates(config, len(planned) + free),
        blocks=kept,
    )
    return _with_steps(plan, planned, last.objective)


def _retrain(config: Config, passes: Sequence[Pass], first: int, altered: Sequence[str]) -> Pass:
    """The last pass over again from a block on; what it started from stays the same."""
    there = len(passes[-1].blocks) if passes else 0
    if not there and first == 0:
        raise UserError(
            "--from-block 0: no block is finished yet; begin anew, elsewhere by --run or after "
            "deleting the folder"
        )
    if not passes or not 0 <= first < there + (not passes[-1].complete):
        raise UserError(
            f"--from-block {first} names no block: the run has {there} finished blocks, counted "
            "from 0"
        )
    last = passes[-1]
    _same_objective(config, last)
    kept = last.blocks[:first]
    plan = dataclasses.replace(
        last, kind="retrain", kept=first, blocks=kept, complete=False, summary={},
        recipe=_recipe(config),
    )  # fmt: skip
    if last.own:
        inherited = [name for name in altered if _inherited(name)]
        if inherited:
            raise UserError(
                f"{inherited[0]} has no effect on the blocks of this pass, which go on from those "
                "before it with their network, solver and steps; leave it as it was "
                "(schedule.later_iterations, schedule.lr and the rest of train may change)"
            )
        later = config.schedule.later_iterations
        spent = last.iterations if later is None else [later] * len(last.iterations)
        parents = len(last.h) // last.parts
        rates = _for_children(_rates(config, parents + last.free), parents, last.parts)
        return dataclasses.replace(plan, iterations=spent, lr=rates)
    if last.tolerance is None:
        _ignored(altered, _SCHEDULE, "the blocks of this pass keep the steps they were added with")
    else:
        planned = [step for row in kept if (step := step_of(row)) is not None]
        planned += steps(config)[first:]
        tolerance, free = config.schedule.tolerance, ends_free(config)
        plan = dataclasses.replace(plan, tolerance=tolerance, free=free)
        plan = _with_steps(plan, planned, last.objective)
    if plan.exhausted:
        raise UserError(
            f"there is no block to train after the first {first}: the schedule ends there; raise "
            "schedule.max_blocks or lower schedule.tolerance"
        )
    count = len(plan.steps) + plan.free
    iterations, substeps = _efforts(config, count)
    return dataclasses.replace(
        plan,
        iterations=iterations,
        substeps=substeps,
        lr=_rates(config, count),
        base=len(passes) - 1,
    )


def _ignored(altered: Sequence[str], names: frozenset[str], why: str) -> None:
    """Refuse what would be written down and not used."""
    for name in altered:
        if name in names:
            raise UserError(f"{name} has no effect here: {why}; leave it as it was")


def _inherited(name: str) -> bool:
    """Whether a later pass takes the value of a key from the blocks before it."""
    section, _, key = name.partition(".")
    own = ("reparameterize", "eta", "refine", "later_iterations", "lr")
    return (
        section in ("velocity", "solver")
        or name == "train.iterations"
        or (section == "schedule" and key not in own)
    )


def _same_objective(config: Config, last: Pass) -> None:
    if objective_of(config) != last.objective:
        raise UserError(
            f"the blocks of this run were trained under {last.objective}, not "
            f"{config.train.objective}; train a run of its own under another objective"
        )


def _recipe(config: Config) -> dict[str, Any]:
    """The train section without what does not decide the weights."""
    recipe = to_dict(config.train)
    return {key: value for key, value in recipe.items() if key not in INDIFFERENT}


def _split(passes: Sequence[Pass]) -> int:
    """Into how many children this run has split its blocks so far."""
    last, split = passes[-1], passes[-1].parts
    while last.base is not None:
        last = passes[last.base]
        split *= last.parts
    return split


def _same_plan(a: Pass, b: Pass) -> bool:
    same = ("kind", "steps", "free", "tolerance", "iterations", "substeps", "lr", "own", "kept")
    return a.recipe == b.recipe and all(getattr(a, name) == getattr(b, name) for name in same)


def _efforts(config: Config, count: int) -> tuple[list[int], list[int]]:
    """Optimiser steps and sub-intervals of each block."""
    schedule = config.schedule
    return (
        _fill(schedule.iterations, config.train.iterations, count),
        _fill(schedule.substeps, config.solver.steps, count),
    )


def _rates(config: Config, count: int) -> list[float]:
    """Peak learning rate of each block."""
    return _fill(config.schedule.lr, config.train.lr, count)


def _fill(values: list[Number] | None, single: Number, count: int) -> list[Number]:
    """One value a block; a short list repeats its last value."""
    given = values or [single]
    return [given[min(index, len(given) - 1)] for index in range(count)]


def _for_children(values: list[Number], split: int, parts: int) -> list[Number]:
    """Values of blocks, of which the first `split` are split into children, for the children."""
    return [value for value in values[:split] for _ in range(parts)] + values[split:]
