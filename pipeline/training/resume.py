"""Whether a run may be continued, and under which settings."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator

from pipeline.config.keys import resume_rule
from pipeline.config.load import differences, with_values
from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.runs.directory import ENVIRONMENT, read_config, start_run, write_environment
from pipeline.storage import atomic
from pipeline.training.sources import Source
from pipeline.training.stages import stage_folder


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
        not path.name.startswith(atomic.TEMPORARY_PREFIX) for path in folder.iterdir()
    ):  # a temporary is all that a run killed in its very first commit leaves
        raise UserError(
            f"{folder} is not empty and holds no run; choose another place with {option}"
        )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        atomic.remove_temporaries_below(folder)  # what a killed process left
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
    changed = differences(old, new)
    allowed = {"free", "later", "moved"} | ({"added"} if anew else set())
    refused = [name for name in changed if resume_rule(name) not in allowed]
    if refused:
        told = ", ".join(f"{key}={changed[key][0]} (now {changed[key][1]})" for key in refused)
        raise UserError(
            f"the run at {folder} was started with {told}; continue it as it was started, or "
            f"train elsewhere with {option}"
        )
    taken = [name for name in changed if resume_rule(name) != "free"]
    return with_values(old, {name: changed[name][1] for name in taken}), bool(taken)
