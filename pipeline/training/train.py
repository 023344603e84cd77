"""Trains a flow block by block: latent cache → run directory.

For every block: open its stage, train, commit the block, push the stage through it, commit
flow.json. Each of these steps is skipped when its result exists. So a training that was killed and
resumed ends in the same bytes as one that was never stopped. Later passes
(`pipeline.training.planner`) repeat this; until one is complete, the pass before it is in use. The
networks of a block may have trained alone (`pipeline.training.networks`); they are joined.

Reference: JKO-iFlow, Algorithm 1.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from pipeline.config.rules.validate import check, check_shape
from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.runs.directory import (
    EXTENDED,
    RESUMED,
    ResumePolicy,
    RunDirectory,
    write_manifest,
)
from pipeline.runs.manifest import ClassesRecord, Manifest
from pipeline.runs.networks import trains_alone
from pipeline.runs.open_log import open_log
from pipeline.runtime.console import Progress, say
from pipeline.runtime.distributed import require_same
from pipeline.runtime.sharding import shards_networks
from pipeline.runtime.system import keep_freed_memory
from pipeline.storage.records import to_json
from pipeline.storage.shards.manifest import content_key
from pipeline.training.block_source import TrainedBlocks, TrainingContext
from pipeline.training.networks.join import NetworkJoiner, check_join
from pipeline.training.pass_trainer import PassTrainer
from pipeline.training.planner import next_pass, recipe_of, with_lower_iterations
from pipeline.training.sources import SampleSource, check_classes, source_of
from pipeline.training.warm_start import open_warm_start


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended.

    Attributes:
        blocks: finished blocks of the last pass.
        complete: whether all passes are finished; if not, the run can be resumed.
        trained: blocks that this call finished.
        passes: passes of the run, an unfinished one included.
        spared: planned blocks of the last pass that its stopping rule made unnecessary.
    """

    blocks: int
    complete: bool
    trained: int
    passes: int = 1
    spared: int = 0


def train(
    config: Config,
    folder: Path,
    accelerator: Accelerator,
    progress: Progress,
    resume: bool,
    source: SampleSource | None = None,
    *,
    add_blocks: int = 0,
    command: str = "jkoflow train --run",
    until: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Outcome:
    """Train a run to its end, or until `train.max_minutes`.

    Args:
        config: the configuration. A run that is continued must have been started with it, except
            for settings that may change (see `pipeline.config.keys.resume_rule`).
        folder: the run directory.
        accelerator: device and ranks.
        progress: wraps loops.
        resume: whether to continue a run that exists; without it such a run is an error.
        source: of the samples; None is the latent cache.
        add_blocks: number of blocks to add to a finished run; implies `resume`.
        command: that resumes the training, up to the folder.
        until: optimiser step of the next block at which to save and stop; None for none.
        clock: of the seconds of optimiser steps.

    Raises:
        UserError: bad configuration, a run that may not continue, or networks that are missing.
        JkoflowError: a block failed.
    """
    joins = trains_alone(folder)
    if joins:
        check_join(config, folder, accelerator)
    context = open_context(config, folder, accelerator, progress, source)
    context = dataclasses.replace(context, clock=clock)
    resume = resume or bool(add_blocks) or joins
    manifest = manifest_to_continue(context, RunDirectory(folder).started if resume else None)
    upcoming = next_pass(config, manifest.passes, add_blocks)
    adds = bool(add_blocks) and upcoming not in manifest.passes
    policy = ResumePolicy(
        resume, command, changes=EXTENDED if adds else RESUMED, verify=context.verify_samples
    )
    RunDirectory.open_or_create(folder, config, policy, accelerator)
    if not manifest.passes and manifest.init_from is not None and accelerator.is_main_process:
        write_manifest(folder, manifest)
    kind = NetworkJoiner if joins else PassTrainer
    trainer = kind(context, manifest, TrainedBlocks(context, manifest.init_from))
    trainer.limits.until = until
    if upcoming is not None:
        with open_log(folder, config, config.train.trackers, accelerator) as log:
            while upcoming is not None and trainer.train(upcoming, log):
                upcoming = next_pass(config, trainer.passes)
    if upcoming is None:
        trainer.tidy()
    passes = trainer.passes
    if not passes:
        return Outcome(0, upcoming is None, trainer.trained, 0)
    last = passes[-1]
    finished = len(last.blocks)
    spared = len(last.steps) + last.free - finished if last.complete else 0
    return Outcome(finished, upcoming is None, trainer.trained, len(passes), spared)


def open_context(
    config: Config,
    folder: Path,
    accelerator: Accelerator,
    progress: Progress,
    source: SampleSource | None = None,
) -> TrainingContext:
    """Check a configuration, and open its samples (a collective).

    The arguments are those of `train`.

    Raises:
        UserError: the configuration does not fit itself, the samples, or the ranks.
    """
    _check_objective(config, accelerator)
    if shards_networks(accelerator):
        _check_sharding(config, accelerator.num_processes)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    samples = source or source_of(config)
    check_shape(config, samples.shape)
    if config.velocity.classes:
        check_classes(samples.class_counts, config.velocity.classes)
    context = TrainingContext(config, folder, samples, accelerator, progress)
    _require_same_training(context)
    return context


def _check_objective(config: Config, accelerator: Accelerator) -> None:
    """Check a configuration; warn of a JKO objective without a lower bound."""
    check(config)
    if config.train.objective == "distill":
        raise UserError(
            "train.objective is distill; expected jko, lfm or fm; make and continue distilled "
            "runs by `jkoflow distill`"
        )
    if config.jko is not None and not config.velocity.autonomous and accelerator.is_main_process:
        say(
            "warning: velocity.autonomous=false under train.objective=jko: a field that depends "
            "on t can overfit the error of its training grid without bound"
        )


def _check_sharding(config: Config, ranks: int) -> None:
    """Check that ranks can share a network under FSDP; its passes are the same on all of them.

    Raises:
        UserError: a setting prevents it.
    """
    train, jko = config.train, config.jko
    if train.batch_size % ranks:
        raise UserError(
            f"train.batch_size is {train.batch_size} for {ranks} processes under FSDP; expected "
            "a multiple of the processes; change it, or launch without FSDP"
        )
    if train.optimizer != "adam":
        raise UserError(
            f"train.optimizer is {train.optimizer} under FSDP; expected adam, because Muon needs "
            "whole matrices; set train.optimizer=adam, or launch without FSDP"
        )
    if jko is None:
        return
    if (
        jko.divergence != "finite-difference"
        or jko.solver.adjoint
        or jko.solver.of_block(0).adaptive
        or config.velocity.nets > 1
    ):
        raise UserError(
            "train.objective is jko under FSDP, which calls a network only as a whole and "
            "differentiates it once; expected fm, lfm, or jko with "
            "jko.divergence=finite-difference, a fixed grid without the adjoint method and "
            "velocity.nets=1; change that, or launch without FSDP"
        )


def restore_stages(
    config: Config,
    folder: Path,
    accelerator: Accelerator,
    progress: Progress,
    source: SampleSource | None = None,
) -> None:
    """Make the stages of a run again where they are lost, to the same bytes.

    The arguments are those of `train`, for the run as it is.

    Raises:
        UserError: the latent cache is absent, or a block is broken.
        JkoflowError: a block cannot be integrated.
    """
    context = TrainingContext(
        config, folder, source or source_of(config), accelerator, progress
    )
    manifest = manifest_to_continue(context, RunDirectory(folder).started)
    blocks = TrainedBlocks(context, manifest.init_from)
    PassTrainer(context, manifest, blocks).restore_stages()


def _require_same_training(context: TrainingContext) -> None:
    """Check that all ranks train the same on the same samples (a collective)."""
    accelerator, config = context.accelerator, context.config
    if accelerator.num_processes > 1:
        samples = content_key(to_json(context.samples.manifest(config.name)))
        require_same(accelerator, samples, "the key of the training samples")
        settings = {"velocity": dataclasses.asdict(config.velocity), **recipe_of(config)}
        require_same(accelerator, content_key(to_json(settings)), "the key of the settings")


def manifest_to_continue(context: TrainingContext, started: Manifest | None) -> Manifest:
    """Return the manifest to continue, or that of a new run.

    Args:
        context: of the training.
        started: the manifest so far; None for a new run.

    Raises:
        UserError: the samples are scaled otherwise, or no block can start as `train.init_from`.
    """
    config, samples = context.config, context.samples
    manifest = samples.manifest(config.name)
    if started is not None:
        _require_same_scale(context.folder, started, manifest)
        passes = with_lower_iterations(config, started.passes)
        manifest = dataclasses.replace(started, exported=None, passes=passes)
    elif config.velocity.classes and samples.class_counts:
        counts = [samples.class_counts.get(k, 0) for k in range(config.velocity.classes)]
        manifest = dataclasses.replace(manifest, classes=ClassesRecord(counts))
    run, record = config.train.init_from, manifest.init_from
    if run is not None and (record is None or record.run != run):
        record = open_warm_start(run, config.velocity, samples.shape)
        manifest = dataclasses.replace(manifest, init_from=record)
    return manifest


def _require_same_scale(folder: Path, started: Manifest, actual: Manifest) -> None:
    """Check that the samples are standardised as those of the finished blocks."""
    if actual.standardisation.to_dict() != started.standardisation.to_dict():
        raise UserError(
            f"the latents in the cache are standardised otherwise than those that the run at "
            f"{folder} was trained on; encode with the images, limit and autoencoder of that "
            "time, or train elsewhere with --run"
        )
