"""Repairs of trainings: the stages and the checkpoint of a run, and autoencoders."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from pipeline.autoencoder_training.train import WEIGHTS, train_autoencoder
from pipeline.config.autoencoder import AutoencoderConfig
from pipeline.config.load import read_resolved
from pipeline.config.schema import Config
from pipeline.data.one_writer import one_writer
from pipeline.distillation import distill
from pipeline.errors import UserError
from pipeline.repair.tools import Tools, removed, reopened
from pipeline.runs.directory import CONFIG, RunDirectory, checkpoint_file
from pipeline.runs.manifest import DerivationRecord
from pipeline.runs.run import Run, open_run
from pipeline.runtime.console import say
from pipeline.storage.training_log import rows_of
from pipeline.toy2d.point_source import PointSource
from pipeline.training import train
from pipeline.training.sources import SampleSource


def push_again(run: Path, stages: Sequence[Path], tools: Tools) -> None:
    """Make the broken shards or manifests of a run's stages again.

    Raises:
        UserError: the latent cache, a block or the teacher is absent or broken.
    """
    directory = RunDirectory(run)
    config, started = directory.config, directory.started
    derived = None if started is None else started.derived_from
    say(f"pushing the training samples through the finished blocks of {run}")
    with one_writer(run, "the run at", tools.accelerator), contextlib.ExitStack() as stack:
        for stage in stages:
            stack.enter_context(reopened(stage))
        given = config, tools.accelerator, tools.progress, _source(config)
        if derived is None:
            train.restore_stages(given[0], run, *given[1:])
        else:
            distill.restore_stages(_teacher(derived), run, *given)


def train_again(run: Path, checkpoint: Path, tools: Tools) -> bool:
    """Train the block of a broken checkpoint again, up to its last step in the log.

    Returns:
        whether there is such a block; nothing needs any other checkpoint.

    Raises:
        UserError: the latent cache, a stage or an earlier block is absent or broken.
        JkoflowError: the training fails.
    """
    directory = RunDirectory(run)
    config, started = directory.config, directory.started
    passes = () if started is None else started.passes
    number = max(0, len(passes) - 1)
    index = len(passes[-1].blocks) if passes else 0
    steps = [
        row["step"] for row in rows_of(run / "log.jsonl")
        if (row.get("pass"), row.get("block")) == (number, index)
        and type(row.get("step")) is int and "event" not in row
    ] if (run / "log.jsonl").is_file() else []  # fmt: skip
    if checkpoint != run / checkpoint_file(index, number) or not steps:
        return False
    say(
        f"training block {index} of {run} again from its start to step {max(steps)}, the last one "
        "in its log; this takes as long as it took before"
    )
    derived = None if started is None else started.derived_from
    accelerator, progress, source = tools.accelerator, tools.progress, _source(config)
    with one_writer(run, "the run at", accelerator), removed(checkpoint):
        if derived is None:
            train.train(config, run, accelerator, progress, True, source, until=max(steps))
        else:
            pairs, teacher = len(derived.groups[0]), _teacher(derived)
            distill.distill(
                teacher, run, config, pairs, accelerator, progress, True, source, max(steps)
            )
    return checkpoint.is_file()


def finish_again(folder: Path, broken: Sequence[Path], tools: Tools) -> bool:
    """Make the weights, the checkpoint or the picture of a finished autoencoder again.

    Without its checkpoint the training starts from the beginning. One that is unfinished is left
    to the command that resumes it.

    Raises:
        UserError: the images are absent.
        JkoflowError: the training fails.
    """
    if not (folder / WEIGHTS).is_file() and folder / WEIGHTS not in broken:
        return False
    config = read_resolved(AutoencoderConfig, folder / CONFIG)
    whole = not any(path.name == "checkpoint.safetensors" for path in broken)
    say(f"{'finishing' if whole else 'training'} the autoencoder in {folder} again")
    with one_writer(folder, "the training in", tools.accelerator), contextlib.ExitStack() as stack:
        for path in broken:
            stack.enter_context(removed(path))
        train_autoencoder(config, folder, tools.accelerator, tools.progress, True)
    return True


def _source(config: Config) -> SampleSource | None:
    """Return the source of points of a run on points; None for the latent cache."""
    return None if config.points is None else PointSource(config)


def _teacher(derived: DerivationRecord) -> Run:
    """Open the teacher of a distilled run.

    Raises:
        UserError: it is gone, or has other blocks than at that time.
    """
    teacher = open_run(Path(derived.run))
    if [row.sha256 for row in teacher.manifest.blocks] != derived.blocks:
        raise UserError(
            f"the run at {derived.run} has other blocks than the teacher had; bring them back"
        )
    return teacher
