"""`jkoflow export` and `jkoflow report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import (
    GuidanceOption,
    GuideOption,
    MethodOption,
    RefinerOption,
    StepsOption,
)


def export(
    run: Annotated[Path, typer.Option("--run", "-r", help="A finished run directory.")],
    out: Annotated[
        Path, typer.Option("--out", help="An empty or absent folder; its name is the run's.")
    ],
    dtype: Annotated[
        str,
        typer.Option(help="Of the stored weights: float16, bfloat16, float32, int10."),
    ] = "float16",
    guide: GuideOption = None,
    refiner: RefinerOption = None,
    guidance: GuidanceOption = None,
    steps: StepsOption = None,
    method: MethodOption = None,
    autoencoder: Annotated[
        str | None,
        typer.Option(
            help="Decode with this one from now on, which has the same encoder as the run's own: "
            "a shipped name or a path."
        ),
    ] = None,
) -> None:
    """Write what is shipped of a run: blocks, numbers, guide, refiner, settings and a card.

    With --guide, --guidance, --refiner, --steps or --method, the exported run samples so unless
    told otherwise.
    """
    from pipeline.publishing.export import export as export_run
    from pipeline.runs.run import open_run
    from pipeline.runtime.console import say
    from pipeline.sampling.sampling_plan import SamplingPlan, with_guidance
    from pipeline.sampling.solvers import with_solver

    opened = open_run(run, images=True)
    settings = with_guidance(opened.config.generate, guidance, guide, refiner)
    plan = SamplingPlan.open(opened, with_solver(settings, steps, method))
    exported = export_run(plan, out, dtype, autoencoder)
    say(
        f"{exported.bytes / 1e6:.1f} MB; rounding to {dtype} moves generated latents by "
        f"{exported.change:.1e} (RMS)"
    )
    print(exported.folder)


def report(
    run: Annotated[Path, typer.Option("--run", "-r", help="A run directory, or zoo:NAME.")],
) -> None:
    """Write report.html into a run: configuration, blocks, pictures, metrics; one file."""
    from pipeline.publishing.report import write_report
    from pipeline.runs.zoo import locate

    print(write_report(locate(run)))
