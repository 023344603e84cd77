"""`jkoflow distill`: the command alone; what it does is in `pipeline.distill`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command()(distill)


def distill(
    run: Annotated[
        Path, typer.Option("--run", "-r", help="The teacher: a finished run, or zoo:NAME.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="The new run directory; default NAME-distilled beside the teacher's folder NAME, "
            "runs/NAME-distilled for zoo:NAME.",
        ),
    ] = None,
    pairs: Annotated[int, typer.Option("--pairs", help="Consecutive blocks merged into one.")] = 2,
    steps: Annotated[
        int, typer.Option("--steps", help="Solver steps a merged block, when images are drawn.")
    ] = 1,
    method: Annotated[
        str, typer.Option("--method", help="Solver that draws them: euler, midpoint, rk4, ….")
    ] = "rk4",
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue what is there; repeat the other options.")
    ] = False,
    max_minutes: Annotated[
        float, typer.Option("--max-minutes", help="Stop cleanly after so long.")
    ] = 0.0,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Override: section.key=value, of train, velocity, push, generate, evaluate; by "
            "default the teacher's network, 5000 iterations a merged block. data.path where "
            "the images lie elsewhere on this machine.",
        ),
    ] = None,
) -> None:
    """Merge blocks into fewer that need few solver steps; the result is a run like any other."""
    from pipeline import distill as merging
    from pipeline import runs
    from pipeline.terminal import accelerator, bar, say

    teacher, out = runs.open_run(run), _folder(out, run)
    settings = merging.Distillation(pairs, steps, method)
    config = merging.student_config(teacher, settings, overrides or [], max_minutes)
    place = accelerator()
    outcome = merging.distill(teacher, out, config, pairs, place, bar, resume)
    if place.is_main_process:
        if outcome.complete:
            say(merging.headline(runs.read_manifest(out)))
        else:
            say(f"{outcome.blocks} merged blocks: stopped in time; continue with --resume")
        print(out)


def _folder(out: Path | None, run: Path) -> Path:
    """The new run directory: as asked for, or named after the teacher's and beside it."""
    from pipeline.shipped import PREFIX, is_shipped, zoo

    if out is not None:
        return out
    if is_shipped(run):
        return Path("runs") / f"{str(run).removeprefix(PREFIX)}-distilled"
    folder = run.expanduser()
    whole = folder.resolve()
    if whole in {path.resolve() for path in zoo().values()}:  # nothing is written into the package
        return Path("runs") / f"{whole.name}-distilled"
    if folder.name in ("", ".."):  # such as the current directory
        folder = whole
    return folder.with_name(f"{folder.name}-distilled")
