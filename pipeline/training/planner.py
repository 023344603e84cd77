"""Plans the passes of a run: pure functions of the configuration and of the passes so far."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, TypeVar

from flows.objectives.schedule import refined_steps, reparameterize, step_sizes
from pipeline.config.keys import resume_rule
from pipeline.config.load import to_dict
from pipeline.config.schema import Config, JkoConfig, of_block
from pipeline.config.validate import ends_free, objective_of, steps
from pipeline.errors import UserError
from pipeline.runs.passes import Pass, step_of

Number = TypeVar("Number", int, float)

def next_pass(
    config: Config,
    passes: Sequence[Pass],
    add_blocks: int = 0,
    altered: Sequence[str] = (),
) -> Pass | None:
    """The pass to be trained now: an unfinished one, one asked for, or one the schedule wants.

    Args:
        config: the configuration.
        passes: of the run so far, in order.
        add_blocks: blocks to be added, 0 for none.
        altered: keys that decide the weights and differ from those of the run so far.

    Returns:
        The last of `passes` itself if it goes on; None if nothing is left to do.

    Raises:
        UserError: a request that the run cannot meet.
    """
    last = passes[-1] if passes else None
    if add_blocks:
        return _add(config, passes, add_blocks, altered)
    if last is None:
        return _ordinary(config)
    if not last.complete:
        return last
    if config.jko is None:
        return None
    if last.reparameterized < config.jko.reparameterize:
        return _reparameterize(config, config.jko, passes)
    if _split(passes) < config.jko.refine:
        return _refine(config, config.jko, passes, _split(passes))
    return None


def _ordinary(config: Config) -> Pass:
    planned, free = steps(config), ends_free(config)
    count = len(planned) + free
    plan = Pass(
        "ordinary",
        [],
        free,
        None if config.fm is not None else config.blocks.tolerance,
        *_efforts(config, count),
        recipe=recipe_of(config),
        lr=_rates(config, count),
    )
    return _with_steps(plan, planned, objective_of(config))


def _with_steps(plan: Pass, planned: list[float], objective: str) -> Pass:
    """The plan with the steps of its blocks, h or γ, where its objective has them."""
    if objective == "jko":
        return dataclasses.replace(plan, objective=objective, h=planned)
    return dataclasses.replace(plan, objective=objective, gamma=planned)


def _reparameterize(config: Config, jko: JkoConfig, passes: Sequence[Pass]) -> Pass:
    rows = [row for row in passes[-1].blocks if row["h"] is not None]
    h = reparameterize(
        [row["h"] for row in rows],
        [row["movement"] for row in rows],
        jko.eta,
        jko.h_max,
    )
    return _later("reparameterize", config, jko, passes, h, 1)


def _refine(config: Config, jko: JkoConfig, passes: Sequence[Pass], split: int) -> Pass:
    wanted = jko.refine
    if wanted % split:
        raise UserError(
            f"the blocks are split into {split} already, which does not divide {wanted}; "
            f"give --refine a multiple of {split}"
        )
    parts = wanted // split
    rows = [row for row in passes[-1].blocks if row["h"] is not None]
    h = refined_steps([row["h"] for row in rows], parts)
    return _later("refine", config, jko, passes, h, parts)


def _later(
    kind: str, config: Config, jko: JkoConfig, passes: Sequence[Pass], h: list[float], parts: int
) -> Pass:
    """A pass in which every block trains on from its own weights."""
    before = passes[-1].blocks
    if not h:
        raise UserError(f"a {kind} pass needs blocks with a movement term; this flow has none")
    solved = [row["spec"]["solver"]["steps"] for row in before if row["h"] is not None]
    substeps = [math.ceil(steps / parts) for steps in solved for _ in range(parts)]
    substeps += [row["spec"]["solver"]["steps"] for row in before if row["h"] is None]
    spent = _for_children(_efforts(config, len(before))[0], len(solved), parts)
    if jko.later_iterations is not None:
        spent = [jko.later_iterations] * len(spent)
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
        recipe=recipe_of(config),
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
    if config.train.objective == "fm":
        raise UserError("flow matching has one block; add blocks under train.objective=lfm or jko")
    rows = [(row, step_of(row)) for row in last.blocks]
    kept = [row for row, step in rows if step is not None]
    planned = [step for _, step in rows if step is not None]
    explicit, first, limit = _growth(config)
    given = explicit[len(planned) : len(planned) + count]
    planned += given
    if len(given) < count:
        rho = config.blocks.rho
        if planned:
            first = planned[-1] * rho
        planned += step_sizes(first, rho, limit, count - len(given))
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
        lr=_rates(config, len(planned) + free),
        blocks=kept,
    )
    return _with_steps(plan, planned, last.objective)


def _growth(config: Config) -> tuple[list[float], float, float]:
    """The explicit steps, the first step and the largest step: h_k, or γ_k under lfm."""
    if config.jko is not None:
        return config.jko.h or [], config.jko.h0, config.jko.h_max
    assert config.lfm is not None
    return config.lfm.gamma or [], config.lfm.gamma1, math.inf


def _same_objective(config: Config, last: Pass) -> None:
    if objective_of(config) != last.objective:
        raise UserError(
            f"the blocks of this run were trained under {last.objective}, not "
            f"{config.train.objective}; train a run of its own under another objective"
        )


def recipe_of(config: Config) -> dict[str, Any]:
    """Return the settings that a pass is trained with: the train section, and the objective's.

    Keys that do not decide the weights are left out.
    """
    plain = to_dict(config)
    train = {k: v for k, v in plain["train"].items() if resume_rule(f"train.{k}") != "free"}
    objective = config.train.objective
    return {**train, objective: plain[objective]} if objective in plain else train


def _split(passes: Sequence[Pass]) -> int:
    """Into how many children this run has split its blocks so far."""
    last, split = passes[-1], passes[-1].parts
    while last.base is not None:
        last = passes[last.base]
        split *= last.parts
    return split


def _efforts(config: Config, count: int) -> tuple[list[int], list[int]]:
    """Optimiser steps of each block, and sub-intervals, under lfm and fm of the sampler."""
    substeps = config.sampler.steps if config.jko is None else config.jko.solver.steps
    blocks = range(count)
    return (
        [of_block(config.train.iterations, index) for index in blocks],
        [of_block(substeps, index) for index in blocks],
    )


def _rates(config: Config, count: int) -> list[float]:
    """Peak learning rate of each block."""
    return [of_block(config.train.lr, index) for index in range(count)]


def _for_children(values: list[Number], split: int, parts: int) -> list[Number]:
    """Values of blocks, of which the first `split` are split into children, for the children."""
    return [value for value in values[:split] for _ in range(parts)] + values[split:]
