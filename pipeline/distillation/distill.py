"""Distillation: a finished run → a run of fewer blocks, each integrated in few solver steps.

Consecutive blocks T_k … T_{k+c−1} of the teacher are merged into one, whose velocity is regressed
on the straight paths from samples z to T_{k+c−1}∘…∘T_k(z). The samples are the training data
pushed through the teacher, so errors of one merged block do not affect the next.

Reference: Xu, Cheng, Xie, "Local flow matching generative models" (2024), distillation.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from pipeline.config.load import overridden
from pipeline.config.rules.validate import check, check_shape
from pipeline.config.sampling import SamplerConfig
from pipeline.config.schema import Config
from pipeline.config.values import of_block
from pipeline.distillation.distilled_blocks import (
    DistilledBlocks,
    distillation_plan,
    same_groups,
    student_manifest,
)
from pipeline.errors import UserError
from pipeline.runs.directory import ResumePolicy, RunDirectory, write_manifest
from pipeline.runs.manifest import Manifest
from pipeline.runs.open_log import open_log
from pipeline.runs.run import Run, require_latents
from pipeline.runtime.console import Progress
from pipeline.training.block_source import TrainingContext
from pipeline.training.pass_trainer import PassTrainer
from pipeline.training.planner import with_lower_iterations
from pipeline.training.sources import LatentSource, SampleSource
from pipeline.training.train import Outcome

#: sections and keys that `--set` may change
SECTIONS = ("train", "velocity", "sampler", "generate", "evaluate", "data.path")
#: of each merged block: a regression needs more steps than a JKO block, and they are cheaper
ITERATIONS = 5000
EMA = 0.999


@dataclass(frozen=True)
class Distillation:
    """Settings of a distillation: blocks merged into one, and the solver that samples.

    The solver has a fixed grid of `steps` a merged block.
    """

    merge: int = 2
    steps: int = 1
    method: str = "rk4"


def student_config(
    teacher: Run, settings: Distillation, overrides: Sequence[str] = (), max_minutes: float = 0.0
) -> Config:
    """Return the configuration of the student of a finished run.

    The overrides `section.key=value` are of the sections and keys in `SECTIONS`. `max_minutes`
    limits the training time; 0 is without limit.

    Raises:
        UserError: values out of range, another section, or a refiner.
    """
    require_latents(teacher)
    if settings.merge < 1 or settings.steps < 1:
        raise UserError(
            f"--merge and --steps must be at least 1, not {settings.merge} and {settings.steps}"
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
        old, name=f"{old.name}-distilled", train=train,
        schedule=None, matching=None, jko=None, lfm=None, fm=None,
        sampler=SamplerConfig(settings.method, settings.steps), velocity=velocity,
        generate=generate,
    )  # fmt: skip
    config = overridden(config, overrides, SECTIONS)
    if config.train.objective != "distill" or config.train.init_from is not None:
        raise UserError(
            "train.objective and train.init_from have no meaning for distill; leave them out"
        )
    velocity = config.velocity
    if velocity.classes != old.velocity.classes or (velocity.classes and velocity.class_dropout):
        raise UserError(
            f"a distilled run has its teacher's velocity.classes, {old.velocity.classes}, and a "
            "velocity.class_dropout of 0; leave both out"
        )
    if velocity.image_channels != old.velocity.image_channels:
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
    merge: int,
    accelerator: Accelerator,
    progress: Progress,
    resume: bool = False,
    source: SampleSource | None = None,
    until: int | None = None,
    options: Sequence[str] = (),
) -> Outcome:
    """Merge each `merge` consecutive blocks of a run into one block of a new run.

    The last group may be smaller. The configuration is from `student_config`. Samples come from
    `source`, or else from the latent cache. At the step `until` of the next block, the training
    saves and stops. `options` are the words of the command line that continue it.

    Raises:
        UserError: the folder holds a run that may not continue, or the samples are not those of
            the teacher.
        JkoflowError: a block failed.
    """
    samples = source or LatentSource(config)
    check_shape(config, tuple(samples.shape))
    _require_same_data(teacher, samples)
    count = len(teacher.manifest.blocks)
    groups = [range(k, min(k + merge, count)) for k in range(0, count, merge)]
    context = TrainingContext(config, folder, samples, accelerator, progress)
    manifest = student_manifest(teacher, config.name, groups)
    started = RunDirectory(folder).started if resume else None
    if started is not None:
        if started.derived_from is None:
            raise UserError(
                f"the run at {folder} is not distilled; choose another place with --out"
            )
        if not same_groups(started.derived_from, manifest.derived_from):
            raise UserError(
                f"the run at {folder} is distilled from other blocks, or in other groups; "
                "continue it with those, or distill elsewhere with --out"
            )
        manifest = manifest.with_passes(with_lower_iterations(config, started.passes))
    command = shlex.join(["jkoflow", "distill", "--run", teacher.name, *options, "--out"])
    policy = ResumePolicy(resume, command, verify=context.verify_samples)
    RunDirectory.open_or_create(folder, config, policy, accelerator)
    if not manifest.passes and accelerator.is_main_process:
        write_manifest(folder, manifest)
    trainer = PassTrainer(context, manifest, DistilledBlocks(context, teacher, groups))
    trainer.limits.until = until
    plan = manifest.current if manifest.passes else distillation_plan(config, teacher, groups)
    with open_log(folder, config, config.train.trackers, accelerator) as log:
        complete = trainer.train(plan, log)
    if complete:
        trainer.tidy()
    return Outcome(len(trainer.current.blocks), complete, trainer.trained)


def restore_stages(
    teacher: Run,
    folder: Path,
    config: Config,
    accelerator: Accelerator,
    progress: Progress,
    source: SampleSource | None = None,
) -> None:
    """Make the stages of a distilled run again where they are lost; see `distill`.

    Raises:
        UserError: the latent cache is absent, or a block of the teacher is broken.
        JkoflowError: the teacher cannot be integrated.
    """
    manifest = RunDirectory(folder).started
    if manifest is None or manifest.derived_from is None:
        raise UserError(f"the run at {folder} is not distilled; make it by `jkoflow distill`")
    groups = [range(group[0], group[-1] + 1) for group in manifest.derived_from.groups]
    samples = source or LatentSource(config)
    context = TrainingContext(config, folder, samples, accelerator, progress)
    blocks = DistilledBlocks(context, teacher, groups)
    PassTrainer(context, manifest, blocks).restore_stages()


def headline(manifest: Manifest) -> str:
    """Describe the distilled blocks on one line."""
    rows, teacher = manifest.blocks, manifest.derived_from
    assert teacher is not None
    worst = [
        max(row.error[way] for row in rows if row.error is not None)
        for way in ("forward", "reverse")
    ]
    return (
        f"{len(teacher.blocks)} blocks of {teacher.name} in {len(rows)}; largest mean squared "
        f"distance from the teacher, per dimension: {worst[0]:.2g} forwards, {worst[1]:.2g} "
        "backwards"
    )


def _require_same_data(teacher: Run, samples: SampleSource) -> None:
    """Check that the samples are standardised as the teacher's."""
    standardisation = samples.manifest(teacher.config.name).standardisation
    if not standardisation.is_close(teacher.standardisation):
        raise UserError(
            f"the latents in the cache are standardised otherwise than those that the run at "
            f"{teacher.name} was trained on; encode the images of that run, or bring their "
            "cache back"
        )
