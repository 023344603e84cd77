"""`jkoflow generate | evaluate`: the commands; the work is in the modules of these names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.errors import UserError
from pipeline.options import (
    BlocksOption,
    GuidanceOption,
    GuideOption,
    MethodOption,
    NfeOption,
    RefinerOption,
    RunOption,
    SetOption,
    StepsOption,
)
from pipeline.terminal import accelerator as accelerator_
from pipeline.terminal import bar, override, replace, say


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.command()(generate)
    app.command()(evaluate)


def generate(
    run: RunOption,
    n: Annotated[int | None, typer.Option("-n", help="Images.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of the noise.")] = None,
    steps: StepsOption = None,
    method: MethodOption = None,
    nfe: NfeOption = None,
    classes: Annotated[
        list[str] | None,
        typer.Option(
            "--class",
            help="Of a class-conditional run: images of this class only, a number or a "
            "subfolder's name; several, or all: one row of the grid each. Default: as often as in "
            "the training data.",
        ),
    ] = None,
    guidance: GuidanceOption = None,
    guide: GuideOption = None,
    refiner: RefinerOption = None,
    blocks: BlocksOption = None,
    out: Annotated[Path | None, typer.Option("--out", help="Where the grid (PNG) goes.")] = None,
    images: Annotated[
        Path | None, typer.Option("--images", help="Also write every image as a PNG here.")
    ] = None,
    npz: Annotated[
        Path | None, typer.Option("--npz", help="Also write all images as one .npz (arr_0).")
    ] = None,
    overrides: SetOption = None,
) -> None:
    """Generate images from a run; writes a grid, and on request all images."""
    from pipeline import generate as sampling
    from pipeline import runs, solvers, writing
    from pipeline.classes import parse_classes
    from pipeline.guidance import with_guidance

    opened = runs.open_run(run, blocks, images=True)
    settings = override(opened.config, overrides, ("generate",)).generate
    labels = parse_classes(opened, classes)
    settings = replace(settings, n=n, seed=seed, labels=labels)
    settings = with_guidance(settings, guidance, guide, refiner)
    settings = solvers.with_solver(settings, steps, method)
    several = len(settings.labels or [])
    if n is None and several > 1:
        settings = replace(settings, n=max(settings.n, several * settings.columns))
    if nfe is not None:
        _one_budget(steps)
        settings = solvers.within(opened, settings, nfe)
    writing.require_outputs(opened, settings.n, images, npz)
    accelerator = accelerator_()
    made = sampling.sample_images(opened, settings, accelerator, bar)
    if not accelerator.is_main_process:
        return
    path = out or opened.folder / "samples" / "grid.png"
    writing.write_grid(made, path, settings.columns**2, settings.columns, several)
    if images is not None:
        writing.write_folder(made, images)
    if npz is not None:
        writing.write_npz(made, npz)
    say(f"{len(made)} images, {made.manifest['nfe']} network evaluations a sample")
    print(path)


def evaluate(
    run: RunOption,
    n: Annotated[int | None, typer.Option("-n", help="Generated images.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of the noise.")] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference", help="A shipped name, a folder, a .npz, or what `reference` wrote."
        ),
    ] = None,
    kid: Annotated[
        int | None,
        typer.Option(
            "--kid",
            help="Real images for KID, precision and recall; by default those whose features an "
            "earlier --kid, of any run on the same data, left behind.",
        ),
    ] = None,
    steps: StepsOption = None,
    method: MethodOption = None,
    nfe: NfeOption = None,
    nfe_study: Annotated[
        str | None,
        typer.Option(
            "--nfe-study",
            help="FID only, at each of these budgets of evaluations a sample, such as 8,16,32: "
            "nfe.json and samples/nfe.png.",
        ),
    ] = None,
    curve: Annotated[
        bool,
        typer.Option(
            "--curve",
            help="FID only, of the weights that train.snapshot_every kept, against samples seen: "
            "curve.json and samples/curve.png.",
        ),
    ] = False,
    guidance: GuidanceOption = None,
    guide: GuideOption = None,
    refiner: RefinerOption = None,
    blocks: BlocksOption = None,
    overrides: SetOption = None,
) -> None:
    """Measure a run: FID with its floor, likelihood, and what stands beside it (metrics.json)."""
    from pipeline import curve as curves
    from pipeline import evaluate as evaluation
    from pipeline import nfe_study as studies
    from pipeline import runs, solvers
    from pipeline.guidance import with_guidance
    from pipeline.summary import headline

    opened = runs.open_run(run, blocks, images=True)
    config = override(opened.config, overrides, ("generate", "evaluate", "data.path"))
    opened = replace(opened, config=config)  # its images may lie elsewhere on this machine
    settings = replace(config.evaluate, n=n, seed=seed, reference=reference, kid=kid)
    solved = with_guidance(config.generate, guidance, guide, refiner)
    solved = solvers.with_solver(solved, steps, method)
    if nfe is not None:
        _one_budget(steps)
        solved = solvers.within(opened, solved, nfe)
    accelerator = accelerator_()
    evaluator = evaluation.Evaluator(accelerator, bar)
    if nfe_study is not None and curve:
        raise UserError("--nfe-study and --curve are two measurements; ask for one at a time")
    if nfe_study is not None:
        if steps is not None or nfe is not None:
            raise UserError("--nfe-study chooses the steps; leave --steps and --nfe out")
        result = studies.study(opened, nfe_study, settings, solved, evaluator)
        if accelerator.is_main_process:
            say(studies.table(result))
            print(opened.folder / studies.FILE)
        return
    if curve:
        result = curves.measure(opened, settings, solved, evaluator)
        if accelerator.is_main_process:
            say(curves.table(result))
            print(opened.folder / curves.FILE)
        return
    warning = evaluation.other_data(opened, settings.reference)
    if warning and accelerator.is_main_process:
        say(warning)
    metrics = evaluator.evaluate(opened, settings, solved)
    if accelerator.is_main_process:
        if "kid" not in metrics:
            say("no features of real images are at hand for KID, precision and recall; --kid 2000 "
                "makes them, once for all runs on this data")  # fmt: skip
        say(headline(metrics))
        print(opened.folder / "metrics.json")


def _one_budget(steps: str | None) -> None:
    if steps is not None:
        raise UserError("--steps and --nfe both choose the solver's steps; leave one of them out")
