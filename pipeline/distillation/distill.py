"""A finished run → a run of fewer blocks that few solver steps can follow.

Consecutive blocks of the teacher, T_k … T_{k+c−1}, are merged into one: its velocity is regressed
on the straight ways from samples z to T_{k+c−1}∘…∘T_k(z) (see
`pipeline.training.matching_loss.pair_loss`).
Samples are the training data pushed through the teacher, group by group, so every group is trained
on what the teacher itself sees, and no error adds up while training. Straight trajectories are
straight in both directions, and sampling needs the way back; both errors are measured and kept.

The result is an ordinary run directory; the teacher and its fingerprint are in flow.json.

Reference: Xu, Cheng, Xie, "Local flow matching generative models" (2024), distillation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from pipeline.config.load import overridden
from pipeline.config.schema import Config, SamplerConfig, of_block
from pipeline.config.validate import check, check_shape
from pipeline.data.standardisation import Standardisation
from pipeline.distillation.distiller import Distiller
from pipeline.errors import UserError
from pipeline.runs.directory import read_config
from pipeline.runs.manifest import read_manifest
from pipeline.runs.run import Run, require_latents
from pipeline.runtime.console import Progress
from pipeline.storage.training_log import Journal
from pipeline.training.resume import check_moved, enter
from pipeline.training.sources import LatentSource, Source
from pipeline.training.train import Outcome

#: sections that `--set` may change
SECTIONS = ("train", "velocity", "sampler", "generate", "evaluate", "data.path")
#: a regression step is cheap, and a JKO run's few would not do
ITERATIONS = 5000
EMA = 0.999


@dataclass(frozen=True)
class Distillation:
    """What is merged, and how the result is followed.

    Attributes:
        pairs: blocks merged into one.
        steps: solver steps a merged block when samples are drawn.
        method: a fixed-grid solver.
    """

    pairs: int = 2
    steps: int = 1
    method: str = "rk4"


def student_config(
    teacher: Run, settings: Distillation, overrides: Sequence[str] = (), max_minutes: float = 0.0
) -> Config:
    """The configuration of the run that comes out.

    Args:
        teacher: the finished run.
        settings: what is merged, and the solver that samples.
        overrides: `section.key=value` of the sections in `SECTIONS`.
        max_minutes: stop cleanly after so long; 0 runs to the end.

    Raises:
        UserError: values out of range, another section, or a refiner.
    """
    require_latents(teacher)
    if settings.pairs < 1 or settings.steps < 1:
        raise UserError(
            f"--pairs and --steps must be at least 1, not {settings.pairs} and {settings.steps}"
        )
    old = teacher.config
    train = dataclasses.replace(
        old.train, objective="distill", iterations=ITERATIONS, lr=of_block(old.train.lr, 0),
        ema=EMA, init_from=None, max_minutes=max_minutes,
    )  # fmt: skip
    velocity = old.velocity
    if velocity.classes:  # every pair has its class
        velocity = dataclasses.replace(velocity, class_dropout=0.0)
    generate = dataclasses.replace(old.generate, guidance=None, guide=None, refiner=None)
    config = dataclasses.replace(
        old, name=f"{old.name}-distilled", train=train, jko=None, lfm=None, fm=None,
        sampler=SamplerConfig(settings.method, settings.steps), velocity=velocity,
        generate=generate,
    )  # fmt: skip
    config = overridden(config, overrides, SECTIONS)
    if config.train.objective != "distill" or config.train.init_from is not None:
        raise UserError("train.objective and train.init_from have no meaning for distill")
    given = config.velocity
    if given.classes != old.velocity.classes or (given.classes and given.class_dropout):
        raise UserError(
            f"a distilled run has its teacher's velocity.classes, {old.velocity.classes}, and a "
            "velocity.class_dropout of 0; leave both out"
        )
    if given.image_channels != old.velocity.image_channels:
        raise UserError(
            "a distilled run has its teacher's velocity.image_channels, "
            f"{old.velocity.image_channels}; leave it out"
        )
    check(config)
    return config


def distill(
    teacher: Run,
    folder: Path,
    config: Config,
    pairs: int,
    accelerator: Accelerator,
    progress: Progress,
    resume: bool = False,
    source: Source | None = None,
) -> Outcome:
    """Merge the blocks of a run, `pairs` at a time, into the blocks of a new run.

    Args:
        teacher: the finished run.
        folder: the new run directory.
        config: from `student_config`.
        pairs: blocks merged into one; the last group may be smaller.
        accelerator: device and processes.
        progress: wraps loops.
        resume: continue what is there.
        source: where the samples come from; None is the latent cache.

    Returns:
        How it ended.

    Raises:
        UserError: a run that is there without `resume` or from another teacher, or data that are
            not the teacher's.
        JkoflowError: a block failed.
    """
    source = source or LatentSource(config)
    check_shape(config, tuple(source.shape))
    _same_data(teacher, source)
    _require_distilled(folder)
    there = resume and (folder / "flow.json").is_file()
    manifest = read_manifest(folder) if there else None
    merger = Distiller(teacher, pairs, config, folder, source, accelerator, progress, manifest)
    if resume:
        check_moved(config, folder, source, accelerator)
    enter(config, folder, accelerator, resume, option="--out")
    with Journal(folder, accelerator.is_main_process) as journal:
        complete = merger.train(merger.plan(), journal)
    if complete:
        merger.tidy()
    return Outcome(len(merger.current.blocks), complete, merger.trained)


def _require_distilled(folder: Path) -> None:
    """Refuse a folder in which a run was trained, not distilled."""
    if (folder / "config.yaml").is_file() and read_config(folder).train.objective != "distill":
        raise UserError(
            f"there is a run at {folder} already, and it is no distilled one; choose another "
            "place with --out"
        )


def headline(manifest: dict[str, Any]) -> str:
    """What became of the blocks, on one line."""
    rows, taught = manifest["blocks"], manifest["teacher"]
    worst = [max(row["error"][way] for row in rows) for way in ("forward", "reverse")]
    return (
        f"{len(taught['blocks'])} blocks of {taught['name']} in {len(rows)}; largest mean squared "
        f"distance from the teacher, per dimension: {worst[0]:.2g} forwards, {worst[1]:.2g} "
        "backwards"
    )


def _same_data(teacher: Run, source: Source) -> None:
    """Refuse data that are standardised otherwise than the teacher's."""
    ours = Standardisation.from_dict(source.manifest()["standardisation"])
    if not ours.is_close(teacher.standardisation):
        raise UserError(
            f"the data at hand are not those that the run at {teacher.folder} was trained on "
            "(their standardisation differs); encode those, or bring their cache back"
        )
