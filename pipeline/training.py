"""Trains the flow block by block: latent cache → run directory.

For every block: open its stage, train, commit the block, push the stage through it, commit
flow.json. Each of these steps is skipped when its result is there, so that a killed training,
run again with `--resume`, ends in the same bytes as one that was never stopped. Later passes
(`pipeline.plans`) do the same over again; until one is complete, the pass before it is used.

Reference: JKO-iFlow, Algorithm 1.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from pipeline import commit
from pipeline.checks import check, check_shape, steps
from pipeline.classes import check_labels
from pipeline.config import Config
from pipeline.config_files import differences
from pipeline.errors import UserError
from pipeline.journal import Journal
from pipeline.latents import Progress
from pipeline.plans import INDIFFERENT, next_pass
from pipeline.residuals import ResidualSource
from pipeline.resources import keep_freed_memory
from pipeline.runs import (
    ENVIRONMENT,
    read_config,
    read_manifest,
    start_run,
    write_environment,
)
from pipeline.stages import LatentSource, Source, stage_folder
from pipeline.trainer import Trainer

__all__ = ["Outcome", "check", "steps", "train"]

#: sections that decide the weights; a run is not continued under other values of them
DECISIVE = (
    "data", "autoencoder", "latents", "velocity", "solver", "push", "schedule", "train", "points",
)  # fmt: skip
#: keys of them that do not
_INDIFFERENT = (*INDIFFERENT, "test_split", "test", "compare", "grid")
#: keys that say what comes after the passes so far; a run goes on under new values of them
LATER = (
    "schedule.reparameterize", "schedule.eta", "schedule.refine", "schedule.later_iterations",
)  # fmt: skip
#: the images may lie elsewhere by now; that they are the same is checked
MOVED = "data.path"
#: sections that may change when blocks are added, or trained again
FREE = ("velocity", "solver", "schedule", "train")
#: keys of them that may not: all blocks of a flow see the classes, or none does
_FIXED = ("velocity.classes",)


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
    from_block: int | None = None,
) -> Outcome:
    """Train a run to its end, or until `train.max_minutes`.

    Args:
        config: the configuration; a run that is continued must have been started with it, but for
            the passes it asks for, where the images lie, and what `add_blocks` and `from_block`
            may change.
        folder: the run directory.
        accelerator: device and processes.
        progress: wraps loops.
        resume: continue what is there; without it a run directory with a run is refused.
        source: where the samples come from; None is the latent cache.
        add_blocks: add so many blocks to a finished run (implies `resume`).
        from_block: train this block and all after it again (implies `resume`).

    Returns:
        How it ended.

    Raises:
        UserError: bad configuration, or a run that is there without `resume`.
        JkoflowError: a block failed.
    """
    check(config)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    source = source or (ResidualSource if config.velocity.beside else LatentSource)(config)
    check_shape(config, source.shape)
    if config.velocity.classes:
        check_labels(source.labels, config.velocity.classes)
    anew = bool(add_blocks) or from_block is not None
    resume = resume or anew
    there = resume and (folder / "flow.json").is_file()
    manifest = read_manifest(folder) if there else None
    trainer = Trainer(config, folder, source, accelerator, progress, manifest)
    altered: list[str] = []
    if anew and (folder / "config.yaml").is_file():
        altered = list(differences(read_config(folder), config, FREE, _INDIFFERENT))
    upcoming = next_pass(config, trainer.passes, add_blocks, from_block, altered)
    if resume:
        check_moved(config, folder, source, accelerator)
    enter(config, folder, accelerator, resume, anew)
    if upcoming is not None:
        with Journal(folder, accelerator.is_main_process) as journal:
            while upcoming is not None and trainer.train(upcoming, journal):
                upcoming = next_pass(config, trainer.passes)
    if upcoming is None:
        trainer.tidy()
    passes = trainer.passes
    done = len(passes[-1].blocks) if passes else 0
    return Outcome(done, upcoming is None, trainer.trained, len(passes))


def check_moved(config: Config, folder: Path, source: Source, accelerator: Accelerator) -> None:
    """Where a run was started on another data.path: refuse other samples than it has.

    Args:
        config: as it is now.
        folder: the run directory.
        source: the samples that lie there now.
        accelerator: device and processes.

    Raises:
        UserError: they are others.
    """
    if not (folder / "config.yaml").is_file():
        return
    path = config.data.path
    if path == read_config(folder).data.path:
        return
    if (stage_folder(folder, 0) / "manifest.json").is_file():
        try:
            source.first_stage(folder, config, accelerator)
        except UserError as error:
            raise UserError(
                f"what lies at {path} is not what the run at {folder} was started with; give the "
                "data.path of the same images, or another folder for the run"
            ) from error


def enter(
    config: Config,
    folder: Path,
    accelerator: Accelerator,
    resume: bool,
    anew: bool = False,
    option: str = "--run",
) -> None:
    """Start a run directory, or make sure that the one there may be continued.

    `option` is what names it on the command line.
    """
    if folder.is_file():
        raise UserError(
            f"{folder} is a file; a run is a folder, choose another place with {option}"
        )
    there = (folder / "config.yaml").is_file()
    if there and not resume:
        raise UserError(
            f"there is a run at {folder} already; continue it with --resume, or choose another "
            f"place with {option}"
        )
    write = not there
    if there:
        config, write = _continued(read_config(folder), config, folder, anew, option)
    elif folder.is_dir() and any(
        not path.name.startswith(commit.TEMPORARY_PREFIX) for path in folder.iterdir()
    ):  # a temporary is all that a run killed in its very first commit leaves
        raise UserError(
            f"{folder} is not empty and holds no run; choose another place with {option}"
        )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        commit.sweep_tree(folder)  # what a killed process left
        if write:
            start_run(folder, config)
        elif not (folder / ENVIRONMENT).is_file():  # killed before it was written
            write_environment(folder)
    accelerator.wait_for_everyone()


def _continued(
    old: Config, new: Config, folder: Path, anew: bool, option: str
) -> tuple[Config, bool]:
    """The configuration to be kept with a run that goes on, and whether it is a new one.

    Raises:
        UserError: values changed that the finished blocks were trained with.
    """
    changed = differences(old, new, DECISIVE, _INDIFFERENT)
    refused = [
        name
        for name in changed
        if name not in (*LATER, MOVED)
        and not (anew and name.partition(".")[0] in FREE and name not in _FIXED)
    ]
    if refused:
        told = ", ".join(f"{key}={changed[key][0]} (now {changed[key][1]})" for key in refused)
        raise UserError(
            f"the run at {folder} was started with {told}; continue it as it was started, or "
            f"train elsewhere with {option}"
        )
    same = {key: getattr(old.train, key) for key in INDIFFERENT}
    kept = dataclasses.replace(
        old,
        data=dataclasses.replace(old.data, path=new.data.path),
        velocity=new.velocity,
        solver=new.solver,
        schedule=new.schedule,
        train=dataclasses.replace(new.train, **same),
    )
    return kept, bool(changed)
