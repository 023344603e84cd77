"""Trains one network of a block alone (`jkoflow train --network J`).

Under flow matching, each of several networks in a block (`velocity.nets`) is regressed on the
samples whose time lies in its part. The networks share no weights. Initial weights, batches, noise
and times are drawn for the whole block, so a network gets those of the training of all. It differs
in one thing: a gradient is clipped by the norm of its own network.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from accelerate import Accelerator

from flows.block import Block
from flows.networks.piecewise import PiecewiseVelocity
from pipeline.config.schema import Config
from pipeline.data.one_writer import one_writer
from pipeline.errors import UserError
from pipeline.runs.directory import (
    ResumePolicy,
    RunDirectory,
    block_file,
    checkpoint_file,
    write_manifest,
)
from pipeline.runs.manifest import FILE, Manifest
from pipeline.runs.networks import (
    FOLDER,
    network_folder,
    read_record,
    require_same,
    write_record,
    write_weights,
)
from pipeline.runs.open_log import open_log
from pipeline.runtime.console import Progress
from pipeline.runtime.sharding import shards_networks
from pipeline.storage import atomic, seal
from pipeline.storage.shards.reader import StoreReader
from pipeline.training.block_loop import Limits, Place, optimise
from pipeline.training.block_source import TrainedBlocks, TrainingContext
from pipeline.training.block_trainer import BlockTrainer
from pipeline.training.networks.join import expected_record
from pipeline.training.planner import next_pass
from pipeline.training.sources import SampleSource
from pipeline.training.train import manifest_to_continue, open_context


def train_network(
    config: Config,
    folder: Path,
    accelerator: Accelerator,
    progress: Progress,
    resume: bool,
    network: int,
    source: SampleSource | None = None,
    *,
    command: str = "jkoflow train --run",
) -> bool:
    """Train one network of a run's block alone, to its end, or until `train.max_minutes`.

    Trainings of other networks of the run may run at the same time. Only the start of the run and
    its samples are shared, and one process at a time makes them.

    Args:
        config: the configuration, the same for all networks.
        folder: the run directory; it is made if it is absent.
        accelerator: device and ranks.
        progress: wraps loops.
        resume: whether to continue a network whose training has begun; without it such a network
            is an error.
        network: its index, from 0.
        source: of the samples; None is the latent cache.
        command: that resumes the run, up to the folder.

    Returns:
        whether the network is finished.

    Raises:
        UserError: the networks of this configuration do not train alone, or the run may not
            continue.
        JkoflowError: the training failed, or another process trains the network.
    """
    require_independent(config, network)
    if shards_networks(accelerator):
        raise UserError(
            "--network trains a part of a block, and FSDP divides a whole one; expected one of "
            "the two; launch without FSDP"
        )
    context = open_context(config, folder, accelerator, progress, source)
    with one_writer(folder, "the run at", accelerator, wait=True):
        manifest, stage = _enter(context, command)
    with one_writer(network_folder(folder, network), "the network in", accelerator):
        return _train(context, manifest, stage, network, resume)


def require_independent(config: Config, network: int) -> None:
    """Check that the networks of a block train alone under a configuration.

    Args:
        config: the configuration.
        network: the one to train.

    Raises:
        UserError: a setting couples them, or there is no such network.
    """
    train, nets = config.train, config.velocity.nets
    if train.objective != "fm":
        raise UserError(
            f"train.objective is {train.objective} with --network; expected fm, under which the "
            "networks of a block are independent; leave --network out"
        )
    if nets == 1:
        raise UserError(
            "velocity.nets is 1 with --network; expected several networks in the block; leave "
            "--network out"
        )
    if not 0 <= network < nets:
        raise UserError(
            f"--network is {network}; expected 0 to {nets - 1}, one of velocity.nets={nets}"
        )
    if config.fm is not None and config.fm.snapshot_every:
        raise UserError(
            f"fm.snapshot_every is {config.fm.snapshot_every} with --network; expected 0, because "
            "a snapshot has the weights of all networks; set it to 0, or leave --network out"
        )


def _enter(context: TrainingContext, command: str) -> tuple[Manifest, StoreReader]:
    """Begin the run, or check that the network belongs to it; return its manifest and samples."""
    folder, config, accelerator = context.folder, context.config, context.accelerator
    directory = RunDirectory(folder)
    begun = [folder / name for name in (FILE, block_file(0), checkpoint_file(0))]
    if not (folder / FOLDER).is_dir() and any(path.is_file() for path in begun):
        raise UserError(
            f"the run at {folder} trains its networks together; expected a new run, or one whose "
            "networks train alone; leave --network out, or train elsewhere with --run"
        )
    if directory.exists and directory.config.train.iterations != config.train.iterations:
        raise UserError(
            f"train.iterations is {config.train.iterations}; expected "
            f"{directory.config.train.iterations}, as all networks of the run at {folder} have; "
            "change it, or train elsewhere with --run"
        )
    manifest = manifest_to_continue(context, directory.started)
    policy = ResumePolicy(True, command, verify=context.verify_samples)
    RunDirectory.open_or_create(folder, config, policy, accelerator)
    if accelerator.is_main_process:
        if not manifest.passes and manifest.init_from is not None:
            write_manifest(folder, manifest)
        (folder / FOLDER).mkdir(exist_ok=True)
    return manifest, context.first_stage()


def _train(
    context: TrainingContext, manifest: Manifest, stage: StoreReader, network: int, resume: bool
) -> bool:
    """Train a network until it is finished, or a limit is reached; return whether it is."""
    config, accelerator = context.config, context.accelerator
    folder = network_folder(context.folder, network)
    record = expected_record(config, manifest, stage, network)
    found = read_record(context.folder, network)
    if found is not None:
        if not resume:
            raise UserError(
                f"network {network} of the run at {context.folder} has begun already; continue "
                "it with --resume, or choose another place with --run"
            )
        require_same(context.folder, found, record)
        if found.sha256 is not None:
            return True
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        atomic.remove_temporaries_below(folder)
        if found is None:
            seal.start(folder)
            write_record(context.folder, record)
    trainer = _trainer(context, manifest, stage, network)
    count = config.velocity.nets
    span = f"t from {network / count:.3g} to {(network + 1) / count:.3g}"
    checkpoint = folder / checkpoint_file(0)
    place = Place(f"network {network} of {count}", span, checkpoint, 0, trainer.iterations)
    limits = Limits(config.train.max_minutes)
    with open_log(folder, config, config.train.trackers, accelerator) as log:
        if not optimise(trainer, log, place, limits, context.progress):
            return False
        log.sync()
    weights = trainer.finish().state_dict()
    if accelerator.is_main_process:
        sha256, seconds = write_weights(context.folder, network, weights), trainer.seconds
        finished = dataclasses.replace(record, sha256=sha256, seconds=round(seconds, 3))
        write_record(context.folder, finished)
        checkpoint.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    return True


def _trainer(
    context: TrainingContext, manifest: Manifest, stage: StoreReader, network: int
) -> BlockTrainer:
    """Return the trainer of one network, with the initial weights that it has in the block."""
    config, count = context.config, context.config.velocity.nets
    plan = next_pass(config, ())
    assert plan is not None
    spec, block = TrainedBlocks(context, manifest.init_from).initial([plan], 0)
    assert isinstance(block.velocity, PiecewiseVelocity)
    alone = Block(block.velocity.restrict(network / count, 1 / count), block.solver)
    recipe = dataclasses.replace(config.train, iterations=plan.iterations[0], lr=plan.lr[0])
    return BlockTrainer(alone, spec, stage, recipe, config.regression, context.accelerator)
