"""`jkoflow toy2d`: the paper's two-dimensional experiments, from points to pictures.

The command alone lives here, so that the command line starts without torch; what it does is in
`pipeline.toy2d.experiment`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipeline.config.schema import Config

FOLDER = "toy2d"


def toy2d_command(
    config: Annotated[
        str | None,
        typer.Option(
            "--config", "-c", help="checkerboard, two_moons, rose, …, or the path of a .yaml."
        ),
    ] = None,
    run: Annotated[
        Path | None, typer.Option("--run", "-r", help="Run directory; default runs/toy2d-NAME.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue what is there.")] = False,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override: section.key=value; may be given several times."),
    ] = None,
) -> None:
    """A two-dimensional experiment: trains, then draws and measures (samples/ of the run)."""
    from pipeline.cli.session import make_accelerator
    from pipeline.errors import UserError
    from pipeline.runs.directory import read_config
    from pipeline.runtime.console import progress_bar, say
    from pipeline.toy2d.experiment import headline, run_experiment

    if config is not None:
        settings = load(config, overrides or [])
    elif run is None or not resume:
        raise UserError("give --config, or --run with --resume to continue a run")
    elif overrides:
        raise UserError("--set goes with --config; a resumed run keeps its configuration")
    else:
        settings = read_config(run)
    folder = run if run is not None else Path("runs") / f"{FOLDER}-{settings.name}"
    accelerator = make_accelerator()
    metrics = run_experiment(settings, folder, accelerator, progress_bar, resume)
    if metrics is None:
        say("stopped in time; continue with --resume")
    else:
        say(headline(metrics))
    print(folder / "samples")


def load(name: str, overrides: Sequence[str] = ()) -> Config:
    """The configuration of an experiment: `checkerboard`, `toy2d/checkerboard`, or a path.

    Raises:
        UserError: unknown name, unreadable YAML, unknown key or wrong type.
    """
    from pipeline.config.load import load_config

    return load_config(name, overrides, FOLDER)
