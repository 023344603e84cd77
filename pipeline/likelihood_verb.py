"""`jkoflow likelihood`: the command alone, so that the command line starts without torch.

What it does is in `pipeline.likelihood`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command()(likelihood)


def likelihood(
    run: Annotated[Path, typer.Option("--run", "-r", help="A run directory, or zoo:NAME.")],
    split: Annotated[
        str | None,
        typer.Option(help="Split of the run's data set; default test, or all if there is none."),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Rank the images of this folder instead of a split.")
    ] = None,
    n: Annotated[int, typer.Option("-n", help="First so many images.")] = 200,
    divergence: Annotated[
        str, typer.Option(help="exact, hutchinson or finite-difference.")
    ] = "exact",
    probes: Annotated[
        int, typer.Option(help="Probes of a random estimator; 2 or more give a standard error.")
    ] = 1,
    columns: Annotated[int, typer.Option(help="Images a row of the picture.")] = 10,
    blocks: Annotated[
        int | None, typer.Option("--blocks", help="Use only the first so many blocks.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="data.path=DIR, where the images lie on this machine."),
    ] = None,
) -> None:
    """Rank images by likelihood: the most typical and the most odd (likelihood.json, a grid)."""
    from pipeline import likelihood as ranking
    from pipeline import runs
    from pipeline.terminal import accelerator, bar, override, replace, say

    opened = runs.open_run(run, blocks, images=True)
    opened = replace(opened, config=override(opened.config, overrides, ("data.path",)))
    settings = ranking.LikelihoodSettings(n, split, folder, divergence, probes, columns)
    process = accelerator()
    result = ranking.rank(opened, settings, process, bar)
    if not process.is_main_process:
        return
    say(ranking.headline(result))
    folder = opened.folder
    for path in (folder / "samples" / "likelihood.png", folder / "likelihood.json"):
        print(path)
