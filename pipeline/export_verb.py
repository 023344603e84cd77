"""`jkoflow export`: the command alone; what it does is in `pipeline.export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command()(export)


def export(
    run: Annotated[Path, typer.Option("--run", "-r", help="A finished run directory.")],
    out: Annotated[
        Path, typer.Option("--out", help="An empty or absent folder; its name is the run's.")
    ],
    dtype: Annotated[
        str, typer.Option(help="Of the stored weights: float16, bfloat16 or float32.")
    ] = "float16",
) -> None:
    """Write what is shipped of a run: blocks, flow.json, config.yaml, numbers and a card."""
    from pipeline import export as exporting
    from pipeline import runs
    from pipeline.terminal import say

    done = exporting.export(runs.open_run(run), out, dtype)
    say(
        f"{done.bytes / 1e6:.1f} MB; rounding to {dtype} moves generated latents by "
        f"{done.change:.1e} (RMS)"
    )
    print(done.folder)
