"""Trains the flow block by block: latent cache → run directory.

For every block: open its stage, train, commit the block, push the stage through it, commit
flow.json. Each of these steps is skipped when its result is there, so that a killed training,
run again with `--resume`, ends in the same bytes as one that was never stopped. Later passes
(`pipeline.training.planner`) do the same over again; until one is complete, the pass before it is
used.

Reference: JKO-iFlow, Algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from pipeline.config.keys import resume_rule
from pipeline.config.load import differences
from pipeline.config.schema import Config
from pipeline.config.validate import check, check_shape, steps
from pipeline.errors import UserError
from pipeline.runs.directory import read_config
from pipeline.runs.manifest import read_manifest
from pipeline.runtime.console import Progress
from pipeline.runtime.system import keep_freed_memory
from pipeline.storage.training_log import Journal
from pipeline.training.pass_trainer import Trainer
from pipeline.training.planner import next_pass
from pipeline.training.resume import check_moved, enter
from pipeline.training.sources import LatentSource, ResidualSource, Source, check_labels

__all__ = ["Outcome", "check", "steps", "train"]


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended.

    Attributes:
        blocks: finished blocks of the last pass.
        complete: whether all that was asked for is done (else it can be resumed).
        trained: blocks that this call finished.
        passes: passes of the run, an unfinished one included.
    """

    blocks: int
    complete: bool
    trained: int
    passes: int = 1


def train(
    config: Config,
    folder: Path,
    accelerator: Accelerator,
    progress: Progress,
    resume: bool,
    source: Source | None = None,
    *,
    add_blocks: int = 0,
) -> Outcome:
    """Train a run to its end, or until `train.max_minutes`.

    Args:
        config: the configuration; a run that is continued must have been started with it, but for
            the passes it asks for, where the images lie, and what `add_blocks` may change.
        folder: the run directory.
        accelerator: device and processes.
        progress: wraps loops.
        resume: continue what is there; without it a run directory with a run is refused.
        source: where the samples come from; None is the latent cache.
        add_blocks: add so many blocks to a finished run (implies `resume`).

    Returns:
        How it ended.

    Raises:
        UserError: bad configuration, or a run that is there without `resume`.
        JkoflowError: a block failed.
    """
    check(config)
    if config.train.objective == "distill":
        raise UserError(
            "train.objective is distill; expected jko, lfm or fm; make and continue distilled "
            "runs by `jkoflow distill`"
        )
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    source = source or (ResidualSource if config.velocity.image_channels else LatentSource)(config)
    check_shape(config, source.shape)
    if config.velocity.classes:
        check_labels(source.labels, config.velocity.classes)
    resume = resume or add_blocks > 0
    there = resume and (folder / "flow.json").is_file()
    manifest = read_manifest(folder) if there else None
    trainer = Trainer(config, folder, source, accelerator, progress, manifest)
    altered: list[str] = []
    if add_blocks and (folder / "config.yaml").is_file():
        changed = differences(read_config(folder), config)
        altered = [name for name in changed if resume_rule(name) == "added"]
    upcoming = next_pass(config, trainer.passes, add_blocks, altered)
    if resume:
        check_moved(config, folder, source, accelerator)
    enter(config, folder, accelerator, resume, add_blocks > 0)
    if upcoming is not None:
        with Journal(folder, accelerator.is_main_process) as journal:
            while upcoming is not None and trainer.train(upcoming, journal):
                upcoming = next_pass(config, trainer.passes)
    if upcoming is None:
        trainer.tidy()
    passes = trainer.passes
    done = len(passes[-1].blocks) if passes else 0
    return Outcome(done, upcoming is None, trainer.trained, len(passes))


