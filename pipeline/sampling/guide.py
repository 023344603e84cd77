"""The guide of autoguidance: a second, weaker run on the latents of the run that it guides.

A guide has the steps of the run, or it is one flow-matching block and the run began as frozen
parts of such a block. It is then frozen at the times of those parts (`flows.freezing`).
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from flows.flow import Flow
from flows.freezing import can_freeze, freeze_flow
from pipeline.config.sampling import GenerateConfig
from pipeline.errors import JkoflowError, UserError
from pipeline.runs.run import Run, open_run, same_autoencoder
from pipeline.runs.snapshots import open_snapshot
from pipeline.runs.zoo import name_of


def open_guide(run: Run, settings: GenerateConfig) -> Run:
    """Open the guide that some settings name, cut to the blocks that the run uses.

    Raises:
        UserError: the guide cannot be opened, does not fit the run, or has no weight.
    """
    name = str(settings.guide)
    if settings.guidance is None:
        raise UserError("a guide needs a weight; add --guidance, such as --guidance 2")
    try:
        guide = _open_run_or_snapshot(name)
    except JkoflowError as error:
        raise UserError(
            f"the guide of the run at {run.name} cannot be used ({error}); give another "
            "--guide, or sample without one by --guide none"
        ) from error
    _require_fit(run, guide, name_of(name))
    return dataclasses.replace(guide, flow=guide.flow[: len(run.flow)])


def guiding_flow(run: Run, guide: Run) -> Flow:
    """Return the flow that guides the blocks of a run in use, one block for each."""
    if not _began_as_parts_of_one(run, guide):
        return guide.flow
    return _frozen(run, guide)[: len(run.flow)]


def _frozen(run: Run, guide: Run) -> Flow:
    """Freeze the only block of a guide at the times of as many parts as the run has blocks."""
    plan = run.manifest.current
    linear = guide.config.regression.interpolant == "linear"
    return freeze_flow(guide.flow, len(plan.steps) + plan.free, from_linear=linear)


def _open_run_or_snapshot(name: str) -> Run:
    """Open RUN, or RUN@STEP, which has the weights that training kept at that step."""
    folder, sign, step = name.rpartition("@")
    if sign and step.isdecimal() and not Path(name).exists():
        return open_snapshot(Path(folder), int(step))
    return open_run(Path(name))


def _require_fit(run: Run, guide: Run, name: str) -> None:
    """Refuse a guide of other latents or steps, or one that cannot be evaluated without labels."""
    if not same_autoencoder(run, guide) or not run.standardisation.is_close(guide.standardisation):
        raise UserError(
            f"guide {name} was trained on other latents than the run at {run.name}; train one "
            "on the same data and autoencoder"
        )
    if not _began_as_parts_of_one(run, guide) and not _same_steps(run, guide):
        raise UserError(
            f"guide {name} must have the objective, the interpolant and the steps of the run at "
            f"{run.name}; train it with the same section {run.config.train.objective} (jko: "
            "with the run's steps as jko.h, and schedule.tolerance=0) and a smaller "
            "velocity.width; a jko run that began as parts of one flow-matching block also takes "
            "one block of flow matching"
        )
    dropout = min(spec.velocity.class_dropout for spec in guide.flow.specs)
    if guide.flow.classes and not dropout:
        raise UserError(
            f"guide {name} was trained with class_dropout=0, but a guide is evaluated without "
            "labels; retrain it with velocity.classes=0 or velocity.class_dropout=0.1"
        )


def _began_as_parts_of_one(run: Run, guide: Run) -> bool:
    """Whether a run began as frozen parts of one block, and the guide is such a block.

    Later passes split or add blocks, which are then no such parts.
    """
    begun, rows = run.manifest.init_from, guide.manifest.blocks
    return (
        run.config.train.objective == "jko"
        and begun is not None
        and run.manifest.current.kind == "ordinary"
        and len(rows) == 1
        and can_freeze(rows[0].spec.velocity)
        and guide.config.train.objective == "fm"
        and (
            begun.shares_time(run.manifest.blocks[0].spec.velocity.autonomous)
            or _has_the_times_of(run, guide)
        )
    )


def _has_the_times_of(run: Run, guide: Run) -> bool:
    """Whether the blocks of a run have the same constant skip connections as a frozen guide.

    Parts of the linear interpolant have such a connection, which depends on their times alone. A
    run that continues one which began as parts keeps it.
    """
    own = [row.spec.skip for row in run.manifest.blocks]
    if not any(own):
        return False
    parts = [spec.skip for spec in _frozen(run, guide).specs]
    return len(own) <= len(parts) and all(map(math.isclose, own, parts))


def _same_steps(run: Run, guide: Run) -> bool:
    """Whether the blocks of a run that are in use have the steps of the guide's blocks."""
    if run.config.regression.interpolant != guide.config.regression.interpolant:
        return False
    count = len(run.flow)
    run_rows, guide_rows = (each.manifest.blocks[:count] for each in (run, guide))
    return len(run_rows) == len(guide_rows) and all(
        a.objective == b.objective and math.isclose(a.step or 0.0, b.step or 0.0, rel_tol=1e-6)
        for a, b in zip(run_rows, guide_rows, strict=True)
    )
