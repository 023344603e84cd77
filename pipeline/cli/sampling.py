"""`jkoflow generate`, `invert`, `interpolate` and `edit`."""

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
#: states between the data and the noise in a strip and in an animation
_COLUMNS, _FRAMES = 6, 16

ImagesArgument = Annotated[
    list[Path] | None,
    typer.Argument(
        help="Images, or folders of images; they are resized and cropped to fit. Default: the "
        "first images of the run's test split."
    ),
]
ClassOption = Annotated[
    str | None,
    typer.Option(
        "--class",
        help="Class of the images, of a class-conditional run. Default: that of the test split, "
        "or no class for images of a file.",
    ),
]
StripOption = Annotated[
    Path | None,
    typer.Option("--out", help="The PNG file of the strip. Default: in samples/ of the run."),
]
PlaceOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="data.path=DIR: the folder of the test split on this machine."),
]
CountOption = Annotated[
    int, typer.Option("-n", help="Number of images of the test split, if no image is given.")
]


def generate_command(
    run: options.RunOption,
    n: Annotated[
        int | None,
        typer.Option("-n", help="Number of images. Default: generate.n of the run, else 64."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Seed of the noise. Default: 0.")
    ] = None,
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
        return _write_states(plan, span, min(n or _ROWS, settings.batch_size), out, accelerator)
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
            f"--blocks is {first}:{last}; expected bounds in 0:{len(plan.run.flow)}, the number "
            "of blocks of this run"
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


def _open(
    run: Path,
    steps: str | None,
    method: str | None,
    guidance: float | None = None,
    overrides: list[str] | None = None,
) -> Any:  # noqa: ANN401 - imported late
    """Open the flow between images and noise of a run."""
    from pipeline.runs.run import open_run
    from pipeline.sampling.image_flow import ImageFlow
    from pipeline.sampling.sampling_plan import SamplingPlan, with_guidance
    from pipeline.sampling.solvers import with_solver

    opened = open_run(run, images=True)
    config = override_settings(opened.config, overrides, ("data.path",))
    opened = with_solver(replace_given(opened, config=config), steps, method)
    settings = with_guidance(opened.config.generate, guidance)
    return ImageFlow.open(SamplingPlan.open(opened, settings), make_accelerator().device)


def _read(flow: Any, paths: list[Path], n: int, name: str | None) -> tuple[Any, Any]:  # noqa: ANN401
    """Return images uint8 (n, C, H, W) and their labels (n,), or None without classes."""
    import torch

    from pipeline.data.image_folder import read_pictures
    from pipeline.evaluation.real_images import held_out_images, require_images
    from pipeline.sampling.class_labels import parse_classes

    labels, run = None, flow.run
    if paths:
        x = torch.from_numpy(read_pictures(paths, flow.autoencoder.image_shape))
    else:
        images = held_out_images(run.config.data)
        require_images(images, n)
        x = torch.from_numpy(images.read(0, n))
        if run.flow.classes and images.labels is not None:
            labels = torch.from_numpy(images.labels[:n])
    if name is not None:
        given = parse_classes(run, [name])
        assert given is not None
        flow.plan.vary(labels=given)  # refuses what does not fit
        labels = torch.tensor(given).repeat(len(x))[: len(x)]
    return x, labels


def _report(flow: Any, inverted: Any) -> None:  # noqa: ANN401
    """Print the inversion error."""
    from pipeline.sampling.solvers import method_of

    solver = flow.plan.solvers[0]
    steps = "" if solver.adaptive else f" with {solver.steps} steps a block"
    say(
        f"inversion error of {len(inverted.error)} images: mean square "
        f"{float(inverted.error.mean()):.1e}, largest {float(inverted.error.max()):.1e} "
        f"({method_of(flow.plan.solvers)}{steps})"
    )


def invert_command(
    run: options.RunOption,
    images: ImagesArgument = None,
    n: CountOption = _ROWS,
    name: ClassOption = None,
    steps: options.StepsOption = None,
    method: options.MethodOption = None,
    out: StripOption = None,
    gif: Annotated[
        Path | None,
        typer.Option("--animation", help="Also write a GIF from the data to noise and back."),
    ] = None,
    npz: Annotated[
        Path | None, typer.Option("--npz", help="Also write the noise to this .npz (arr_0).")
    ] = None,
    overrides: PlaceOption = None,
) -> None:
    """Carry images to their noise and back; prints the inversion error and writes a strip.

    The columns are the images, their states on the way to the noise, and the images on return.
    """
    import dataclasses
    from functools import partial

    import numpy as np

    from pipeline.sampling.image_files import write_animation, write_strip
    from pipeline.storage import atomic

    options.require_places(out, gif, npz)
    flow = _open(run, steps, method, overrides=overrides)
    x, labels = _read(flow, images or [], n, name)
    z = flow.encode(x)
    inverted = flow.invert(z, labels)
    _report(flow, inverted)
    count = len(flow.run.flow)
    times = [count * i / _COLUMNS for i in range(_COLUMNS + 1)]
    states = [flow.decode(state) for state in flow.path(z, times, labels)]
    note = {"inversion_mse": float(inverted.error.mean()), "sampling": flow.plan.identity()}
    path = out or flow.run.folder / "samples" / "inversion.png"
    write_strip([x, *states, flow.decode(inverted.returned)], path, note)
    if npz is not None:
        noise = inverted.noise.cpu().numpy()
        atomic.write_with(npz, partial(np.savez, arr_0=noise))
    if gif is not None:
        own = dataclasses.replace(flow, plan=flow.unguided)
        times = [count * i / _FRAMES for i in range(_FRAMES + 1)]
        there = list(own.path(z, times, labels))
        back = list(own.path(there[-1], times[::-1], labels))
        write_animation([flow.decode(state) for state in [*there, *back[1:]]], gif)
    say("columns: images, their states on the way to the noise, and the images on return")
    print(path)


def interpolate_command(
    run: options.RunOption,
    a: Annotated[Path, typer.Argument(help="An image.")],
    b: Annotated[Path, typer.Argument(help="Another image.")],
    n: Annotated[int, typer.Option("-n", help="Number of images, both ends included.")] = _ROWS,
    name: ClassOption = None,
    steps: options.StepsOption = None,
    method: options.MethodOption = None,
    out: StripOption = None,
) -> None:
    """Interpolate between the noises of two images; prints the inversion error, writes a strip."""
    from pipeline.sampling.image_files import write_strip
    from pipeline.sampling.image_flow import interpolate

    options.require_places(out)
    flow = _open(run, steps, method)
    x, labels = _read(flow, [a, b], 2, name)
    inverted = flow.invert(flow.encode(x), labels)
    _report(flow, inverted)
    noise = interpolate(inverted.noise[0], inverted.noise[1], n)
    latents = flow.revert(noise, None if labels is None else labels[:1].repeat(n))
    path = out or flow.run.folder / "samples" / "interpolation.png"
    note = {"inversion_mse": float(inverted.error.mean()), "sampling": flow.unguided.identity()}
    write_strip([image[None] for image in flow.decode(latents)], path, note)
    print(path)


def edit_command(
    run: options.RunOption,
    to: Annotated[
        list[str],
        typer.Option("--to", help="Class of the results: a name, a number or all; repeatable."),
    ],
    images: ImagesArgument = None,
    n: CountOption = _ROWS,
    strength: Annotated[
        float, typer.Option("--strength", help="Part of the way to the noise, in (0, 1].")
    ] = 0.8,
    name: ClassOption = None,
    guidance: options.GuidanceOption = None,
    steps: options.StepsOption = None,
    method: options.MethodOption = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the refiner's noise.")] = 0,
    out: StripOption = None,
    overrides: PlaceOption = None,
) -> None:
    """Turn images into other classes: inverts part of the way, and samples back.

    The columns are the images, their reconstructions, and the results for every class of --to.
    The inversion error is printed.
    """
    import torch

    from pipeline.sampling.class_labels import parse_classes
    from pipeline.sampling.image_files import write_strip

    options.require_places(out)
    flow = _open(run, steps, method, guidance, overrides)
    flow.require_edit(strength)
    targets = parse_classes(flow.run, to) or []
    flow.plan.vary(labels=targets)  # refuses what does not fit
    x, labels = _read(flow, images or [], n, name)
    z = flow.encode(x)
    inverted = flow.invert(z, labels)
    _report(flow, inverted)
    columns = [x, flow.decode(z, seed)]
    for target in targets:
        edited = flow.edit(z, torch.full((len(z),), target), strength, labels)
        columns.append(flow.decode(edited, seed))
    path = out or flow.run.folder / "samples" / "edits.png"
    note = {"strength": strength, "to": targets, "sampling": flow.plan.identity()}
    write_strip(columns, path, note)
    say("columns: images, their reconstructions, and the results for every class of --to")
    print(path)
