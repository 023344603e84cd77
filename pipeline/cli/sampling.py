"""`jkoflow generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli import options
from pipeline.cli.session import make_accelerator, override_settings, replace_given
from pipeline.runtime.console import progress_bar, say


def generate_command(
    run: options.RunOption,
    n: Annotated[int | None, typer.Option("-n", help="Number of images.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of the noise.")] = None,
    steps: options.StepsOption = None,
    method: options.MethodOption = None,
    nfe: options.NfeOption = None,
    classes: Annotated[
        list[str] | None,
        typer.Option(
            "--class",
            help="Class of the images, of a class-conditional run: a number, the name of a "
            "training folder, or all. May be repeated; each class has its row of the grid. "
            "Default: random classes, as frequent as in the training data.",
        ),
    ] = None,
    guidance: options.GuidanceOption = None,
    guide: options.GuideOption = None,
    refiner: options.RefinerOption = None,
    blocks: options.BlocksOption = None,
    out: Annotated[Path | None, typer.Option("--out", help="The PNG file of the grid.")] = None,
    images: Annotated[
        Path | None, typer.Option("--images", help="Also write every image as a PNG here.")
    ] = None,
    npz: Annotated[
        Path | None, typer.Option("--npz", help="Also write all images to this .npz (arr_0).")
    ] = None,
    overrides: options.SetOption = None,
) -> None:
    """Sample images from a run; writes a grid and, on request, all images."""
    from pipeline.runs.run import open_run
    from pipeline.sampling.class_labels import parse_classes
    from pipeline.sampling.generate import sample_images
    from pipeline.sampling.image_files import require_outputs, write_folder, write_grid, write_npz
    from pipeline.sampling.sampling_plan import SamplingPlan, with_guidance
    from pipeline.sampling.solvers import with_solver

    opened = open_run(run, blocks, images=True)
    config = override_settings(opened.config, overrides, ("generate", "sampler"))
    opened = with_solver(replace_given(opened, config=config), steps, method)
    settings = config.generate
    labels = parse_classes(opened, classes)
    settings = replace_given(settings, n=n, seed=seed, labels=labels)
    settings = with_guidance(settings, guidance, guide, refiner)
    several = len(settings.labels or [])
    if n is None and several > 1:
        settings = replace_given(settings, n=max(settings.n, several * settings.columns))
    if nfe is not None:
        options.require_one_budget(steps)
    plan = SamplingPlan.open(opened, settings)
    if nfe is not None:
        plan = plan.within(nfe)
    require_outputs(opened, settings.n, images, npz)
    accelerator = make_accelerator()
    store = sample_images(plan, settings.n, settings.seed, accelerator, progress_bar)
    if not accelerator.is_main_process:
        return
    path = out or opened.folder / "samples" / "grid.png"
    write_grid(store, path, settings.columns**2, settings.columns, several)
    if images is not None:
        write_folder(store, images)
    if npz is not None:
        write_npz(store, npz)
    say(f"{len(store)} images, {store.manifest['nfe']} network evaluations a sample")
    print(path)
