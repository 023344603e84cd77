"""`jkoflow toy2d`: the two-dimensional experiments of the paper."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import OptionalConfigOption, ResumeOption, SetOption
from pipeline.errors import UserError

#: folder of the packaged configurations, and prefix of a run directory
FOLDER = "toy2d"


def toy2d_command(
    config: OptionalConfigOption = None,
    run: Annotated[
        Path | None, typer.Option("--run", "-r", help="Run directory; default runs/toy2d-NAME.")
    ] = None,
    resume: ResumeOption = False,
    overrides: SetOption = None,
) -> None:
    """Train a flow on points in the plane, measure and plot it; writes samples/ of the run."""
    from pipeline.cli.session import make_accelerator
    from pipeline.config.load import load_config
    from pipeline.runs.directory import read_config
    from pipeline.runtime.console import progress_bar, say
    from pipeline.toy2d.experiment import experiment_line, run_experiment

    if config is not None:
        settings = load_config(config, overrides or [], FOLDER)
    elif run is None or not resume:
        raise UserError("--config is missing; give it, or --run with --resume to continue a run")
    elif overrides:
        raise UserError("--set goes with --config; a resumed run keeps its configuration")
    else:
        settings = read_config(run)
    folder = run if run is not None else Path("runs") / f"{FOLDER}-{settings.name}"
    metrics = run_experiment(settings, folder, make_accelerator(), progress_bar, resume)
    if metrics is None:
        say("stopped by train.max_minutes; continue with --resume")
    else:
        say(experiment_line(metrics))
    print(folder / "samples")
