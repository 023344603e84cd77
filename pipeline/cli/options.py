"""Options that several verbs of the command line share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigOption = Annotated[
    str, typer.Option("--config", "-c", help="A packaged configuration, or the path of a .yaml.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override: section.key=value; may be given several times."),
]
RunOption = Annotated[
    Path, typer.Option("--run", "-r", help="A run directory, or zoo:NAME for a shipped run.")
]
GuidanceOption = Annotated[
    float | None,
    typer.Option(
        "--guidance",
        help="Of a class-conditional run: w of v(null) + w (v(class) - v(null)); 1 is the plain "
        "conditional flow, more exaggerates, at twice the evaluations. With a guide, whose "
        "velocity is g, of any run: w of g + w (v - g). Default: the configuration's "
        "generate.guidance, else 1.",
    ),
]
GuideOption = Annotated[
    str | None,
    typer.Option(
        "--guide",
        help="A second run on the same latents, smaller or trained for less long, whose errors "
        "the run is led away from, by --guidance; it is not told the class. RUN@STEP is what "
        "RUN was at a step that train.snapshot_every kept. none takes the configuration's away.",
    ),
]
RefinerOption = Annotated[
    str | None,
    typer.Option(
        "--refiner",
        help="A second run on the same autoencoder, trained with velocity.beside (configurations "
        "such as cifar10-refiner), which draws what the decoder leaves out of every image. none "
        "takes the configuration's away.",
    ),
]
BlocksOption = Annotated[
    int | None, typer.Option("--blocks", help="Use only the first so many blocks.")
]

StepsOption = Annotated[
    str | None,
    typer.Option(
        "--steps", help="Solver steps a block: one number, or one a block, data side first: 1,2,4."
    ),
]
MethodOption = Annotated[
    str | None,
    typer.Option(
        "--method",
        help="Solver: euler, midpoint, rk4, dopri5, …; one, or one a block, data side first: "
        "midpoint,euler,euler. An adaptive one such as dopri5 takes no steps.",
    ),
]
NfeOption = Annotated[
    int | None, typer.Option("--nfe", help="At most so many network evaluations a sample.")
]
