"""`jkoflow generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli import options
from pipeline.cli.session import make_accelerator, override_settings, replace_given
from pipeline.errors import UserError
from pipeline.runtime.console import progress_bar, say

#: images of a strip, by default
_ROWS = 8


def generate_command(
    run: options.RunOption,
    n: Annotated[
        int | None,
        typer.Option("-n", help="Number of images. Default: generate.n of the run, else 64."),
    ] = None,
    seed: options.SeedOption = None,
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
    blocks: Annotated[
        str | None,
        typer.Option(
            "--blocks",
            help="Use only the first blocks, this many; or 0:3, a strip of z_3, z_2, z_1 and z_0, "
            "decoded: one row per image, from the noise side to the data.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The PNG of the grid. Default: samples/grid.png of the run."),
    ] = None,
    images: Annotated[
        Path | None, typer.Option("--images", help="Also write every image as a PNG here.")
    ] = None,
    npz: Annotated[
        Path | None, typer.Option("--npz", help="Also write all images to this .npz (arr_0).")
    ] = None,
    overrides: options.SetOption = None,
) -> None:
    """Sample images from a run; writes a grid and, on request, all images."""
    from pipeline.runs.unfinished import open_latest
    from pipeline.runtime.devices import warn_of_slow_bf16
    from pipeline.sampling.class_labels import parse_classes
    from pipeline.sampling.generate import sample_images
    from pipeline.sampling.image_files import require_outputs, write_folder, write_grid, write_npz
    from pipeline.sampling.sampling_plan import SamplingPlan, with_guidance
    from pipeline.sampling.solvers import with_solver

    span = _span(blocks)
    options.require_places(out, npz, None if images is None else images / "000000.png")
    opened = open_latest(run, span if isinstance(span, int) else None, images=True)
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
    accelerator = make_accelerator()
    warn_of_slow_bf16(settings.precision, accelerator)
    if opened.training is not None and accelerator.is_main_process:
        say(opened.training.sentence(opened.folder))
    if isinstance(span, tuple):
        if images is not None or npz is not None:
            raise UserError("--blocks A:B writes one strip; leave --images and --npz out")
        rows = min(_ROWS, settings.batch_size) if n is None else n
        return _write_states(plan, span, rows, out, accelerator)
    require_outputs(opened, settings.n, images, npz)
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


def _span(blocks: str | None) -> int | tuple[int, int] | None:
    """Return the value of `--blocks`: a number of blocks, or the bounds of A:B."""
    if blocks is None:
        return None
    parts = blocks.split(":")
    if len(parts) > 2 or not all(part.removeprefix("-").isdecimal() for part in parts):
        raise UserError(f"--blocks is {blocks!r}; expected a number, or two such as 0:3")
    return int(parts[0]) if len(parts) == 1 else (int(parts[0]), int(parts[1]))


def _write_states(
    plan: Any,  # noqa: ANN401
    span: tuple[int, int],
    n: int,
    out: Path | None,
    accelerator: Any,  # noqa: ANN401
) -> None:
    """Write the strip of `generate --blocks A:B`."""
    from pipeline.sampling.image_files import write_strip
    from pipeline.sampling.image_flow import ImageFlow

    first, last = span
    if not 0 <= first < last <= len(plan.run.flow):
        raise UserError(
            f"--blocks is {first}:{last}; expected A:B with A below B, both from 0 to "
            f"{len(plan.run.flow)}, the number of blocks of this run; change it"
        )
    flow = ImageFlow.open(plan, accelerator.device)
    columns = flow.states(n, plan.settings.seed, [float(t) for t in range(last, first - 1, -1)])
    path = out or plan.run.folder / "samples" / "blocks.png"
    write_strip(columns, path, {"blocks": [first, last], "sampling": plan.identity()})
    say(
        f"columns from left to right: z_{last} to z_{first}, decoded (z_0 is the data side, "
        f"z_{len(plan.run.flow)} the noise)"
    )
    print(path)
