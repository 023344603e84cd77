"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.errors import UserError
from pipeline.storage.paths import require_place

_CONFIG = typer.Option(
    "--config", "-c", help="A packaged configuration, or the path of a .yaml."
)
ConfigOption = Annotated[str, _CONFIG]
OptionalConfigOption = Annotated[str | None, _CONFIG]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override: section.key=value; may be repeated."),
]
DryRunOption = Annotated[
    bool,
    typer.Option("--dry-run", help="Print the work, the files that are reused and sizes; stop."),
]
RunOption = Annotated[
    Path,
    typer.Option(
        "--run", "-r", help="A run directory, zoo:NAME for a shipped run, or hf://owner/name."
    ),
]
SeedOption = Annotated[
    int | None, typer.Option("--seed", help="Seed of the noise. Default: 0.")
]
GuidanceOption = Annotated[
    float | None,
    typer.Option(
        "--guidance",
        help="Weight w of guidance, at twice the network evaluations. Classifier-free guidance of "
        "a class-conditional run follows v(null) + w (v(class) - v(null)). With a guide, whose "
        "velocity is g, any run follows g + w (v - g). 1 is the run's own flow. Default: "
        "generate.guidance of the configuration, else 1.",
    ),
]
GuideOption = Annotated[
    str | None,
    typer.Option(
        "--guide",
        help="Autoguidance: a second run on the same latents, smaller or trained for a shorter "
        "time. Sampling extrapolates from its velocity, which is evaluated without a class label. "
        "RUN@STEP is RUN at a step that fm.snapshot_every kept; none removes the guide of the "
        "configuration.",
    ),
]
RefinerOption = Annotated[
    str | None,
    typer.Option(
        "--refiner",
        help="A second run on the same autoencoder, trained with velocity.image_channels "
        "(configurations such as cifar10-refiner), that samples the detail missing in decoded "
        "images; none removes the refiner of the configuration.",
    ),
]
BlocksOption = Annotated[
    int | None, typer.Option("--blocks", help="Use only the first blocks, this many.")
]

StepsOption = Annotated[
    str | None,
    typer.Option(
        "--steps",
        help="Solver steps per block: one number, or one per block, data side first: 1,2,4.",
    ),
]
MethodOption = Annotated[
    str | None,
    typer.Option(
        "--method",
        help="Solver: euler, midpoint, rk4, dopri5, …; one, or one per block, data side first: "
        "midpoint,euler,euler. An adaptive solver such as dopri5 takes no steps.",
    ),
]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Continue an unfinished run; finished steps are kept.")
]
NfeOption = Annotated[
    int | None, typer.Option("--nfe", help="Largest number of network evaluations per sample.")
]


def require_one_budget(steps: str | None) -> None:
    """Check that `--steps` is not given together with `--nfe`.

    Raises:
        UserError: both are given.
    """
    if steps is not None:
        raise UserError("--steps and --nfe both choose the solver's steps; leave one of them out")


def require_places(*paths: Path | None) -> None:
    """Check that the files of a command can be written there, before its work.

    Raises:
        UserError: one cannot.
    """
    for path in paths:
        require_place(path)
