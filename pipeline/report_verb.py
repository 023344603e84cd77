"""`jkoflow report`: the command alone; what it does is in `pipeline.report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command()(report)


def report(
    run: Annotated[Path, typer.Option("--run", "-r", help="A run directory, or zoo:NAME.")],
) -> None:
    """Write report.html into a run: configuration, blocks, pictures, metrics; one file."""
    from pipeline.report import write_report
    from pipeline.shipped import locate

    print(write_report(locate(run)))
