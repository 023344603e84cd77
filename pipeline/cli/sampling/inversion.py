"""`jkoflow invert`, `interpolate` and `edit`: images to noise and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli import options
from pipeline.cli.session import make_accelerator, override_settings, replace_given
from pipeline.errors import UserError
from pipeline.runtime.console import say

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
    import numpy as np
    import torch

    from pipeline.data.image_folder import read_pictures
    from pipeline.evaluation.real_images import held_out_images, require_images
    from pipeline.sampling.class_labels import condition_of, parse_classes

    labels, run = None, flow.run
    if paths:
        x = torch.from_numpy(read_pictures(paths, flow.autoencoder.image_shape))
    else:
        if n < 1:
            raise UserError(f"-n is {n}; expected 1 or more")
        images = held_out_images(run.config.data)
        require_images(images, n)
        x = torch.from_numpy(images.read(0, n))
        if name is None and images.labels is not None:
            condition = condition_of(run, images, np.arange(n))
            labels = None if condition is None else condition.labels
    if name is not None:
        given = parse_classes(run, [name])
        assert given is not None
        flow.plan.vary(labels=given)  # refuses what does not fit
        labels = torch.tensor(given).repeat(len(x))[: len(x)]
    return x, labels


def _report(flow: Any, inverted: Any) -> None:  # noqa: ANN401
    """Print the inversion error."""
    from pipeline.sampling.solvers import method_of

    counts = [str(each.steps) for each in flow.plan.solvers if not each.adaptive]
    listed = counts[0] if len(set(counts)) == 1 else ", ".join(counts)
    steps = f"; steps of each block: {listed}" if counts else ""
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
    for path in (a, b):
        if path.expanduser().is_dir():
            raise UserError(f"{path} is a folder; expected an image; name one of its images")
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
