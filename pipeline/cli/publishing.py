"""`jkoflow explore`, `export`, `push` and `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import (
    GuidanceOption,
    GuideOption,
    MethodOption,
    RefinerOption,
    RunOption,
    StepsOption,
    require_places,
)
from pipeline.errors import UserError


def export_command(
    run: Annotated[Path, typer.Option("--run", "-r", help="A finished run directory.")],
    out: Annotated[
        Path, typer.Option("--out", help="An empty or absent folder, whose name the card takes.")
    ],
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Dtype of the stored weights: float16 (default), bfloat16, float32, int10, or "
            "shared: similar blocks share the mean of their large weights, in six bits."
        ),
    ] = None,
    guide: GuideOption = None,
    refiner: RefinerOption = None,
    guidance: GuidanceOption = None,
    steps: StepsOption = None,
    method: MethodOption = None,
    autoencoder: Annotated[
        str | None,
        typer.Option(
            help="Another autoencoder with the same encoder, a shipped name or a path, whose "
            "decoder replaces the run's."
        ),
    ] = None,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Write sampler, decoder and refiner as ONNX instead.")
    ] = False,
    torch_export: Annotated[
        bool, typer.Option("--torch-export", help="Write them as torch.export files instead.")
    ] = False,
) -> None:
    """Export a run to a small folder: blocks, metrics, guide, refiner, settings and a model card.

    --guide, --guidance, --refiner, --steps and --method set the defaults of the exported run.
    --onnx and --torch-export write graphs that run without jkoflow, in float32.
    """
    from pipeline.publishing.export import export
    from pipeline.publishing.programs import write_programs
    from pipeline.runs.run import open_run
    from pipeline.runtime.console import say
    from pipeline.sampling.sampling_plan import SamplingPlan, with_guidance
    from pipeline.sampling.solvers import with_solver

    opened = open_run(run, images=True)
    settings = with_guidance(opened.config.generate, guidance, guide, refiner)
    plan = SamplingPlan.open(with_solver(opened, steps, method), settings)
    if onnx or torch_export:
        if onnx and torch_export:
            raise UserError("--onnx and --torch-export are two formats; choose one")
        if dtype is not None or autoencoder is not None:
            raise UserError("a program has its own weights; leave --dtype and --autoencoder out")
        described = write_programs(plan, out, "onnx" if onnx else "torch-export")["programs"]
        for name, entry in described.items():
            say(f"{name} differs from PyTorch by {entry['difference']:.1e}")
        print(out)
        return
    dtype = "float16" if dtype is None else dtype
    exported = export(plan, out, dtype, autoencoder)
    say(
        f"{exported.bytes / 1e6:.1f} MB; rounding to {dtype} moves generated latents by "
        f"{exported.change:.1e} (RMS)"
    )
    say("CARD.md has (to be written) in place of purpose, hardware and licences; fill them in")
    print(exported.folder)


def push_command(
    run: Annotated[
        Path, typer.Argument(help="A finished run directory, or zoo:NAME for a shipped run.")
    ],
    name: Annotated[str, typer.Argument(help="OWNER/NAME of the repository on the hub.")],
    dtype: Annotated[
        str,
        typer.Option(
            help="Dtype of the stored weights: float16, bfloat16, float32, int10 or shared."
        ),
    ] = "float16",
    private: Annotated[
        bool, typer.Option("--private", help="Create the repository as a private one.")
    ] = False,
) -> None:
    """Export a run and upload it to the Hugging Face hub, with its card as README.md.

    `hf auth login` or the variable HF_TOKEN gives the permission. The run is then named
    hf://OWNER/NAME.
    """
    from pipeline.publishing.push import push
    from pipeline.runs.run import open_run
    from pipeline.sampling.sampling_plan import SamplingPlan

    opened = open_run(run, images=True)
    print(push(SamplingPlan.open(opened, opened.config.generate), name, dtype, private))


def report_command(
    runs: Annotated[
        list[str] | None,
        typer.Argument(help="Runs to compare on one page, such as runs/a runs/b zoo:mnist."),
    ] = None,
    run: Annotated[
        Path | None, typer.Option("--run", "-r", help="A run, whose report.html is written.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The HTML file of a comparison; default comparison.html."),
    ] = None,
    neighbours: Annotated[
        int,
        typer.Option(
            "--neighbours",
            min=0,
            help="With --run: compare 100 samples with this many training images, by pixels and "
            "by Inception features, and draw the ten closest; 0 compares none.",
        ),
    ] = 0,
) -> None:
    """Write report.html into a run, or compare runs, on one page that needs no other file.

    A report shows configuration, blocks, pictures and metrics. A comparison shows metrics, losses,
    samples, previews and the settings that differ.
    """
    from pipeline.errors import UserError
    from pipeline.publishing.comparison import write_comparison
    from pipeline.publishing.report import write_report
    from pipeline.runs.zoo import locate

    if bool(runs) == (run is not None):
        raise UserError(
            "report takes either --run with one run or the names of runs to compare; give one"
        )
    if run is None:
        if neighbours:
            raise UserError("--neighbours goes with --run; leave it out of a comparison")
        page = out or Path("comparison.html")
        require_places(page)
        return print(write_comparison(runs or [], page))
    if out is not None:
        raise UserError(
            "--out goes with runs to compare; a report lies in its run; leave --out out"
        )
    if neighbours:
        _draw_neighbours(run, neighbours)
    print(write_report(locate(run)))


def _draw_neighbours(run: Path, n: int) -> None:
    """Draw the nearest training images of a run's samples."""
    from pipeline.cli.session import make_accelerator
    from pipeline.publishing.neighbours import draw_neighbours
    from pipeline.runs.run import open_run
    from pipeline.runtime.console import progress_bar
    from pipeline.sampling.sampling_plan import SamplingPlan

    opened = open_run(run, images=True)
    plan = SamplingPlan.open(opened, opened.config.generate)
    draw_neighbours(plan, n, make_accelerator(), progress_bar)


def explore_command(
    run: RunOption,
    guide: GuideOption = None,
    refiner: RefinerOption = None,
    guidance: GuidanceOption = None,
    host: Annotated[
        str,
        typer.Option(
            "--host",
            help="Address that the page listens on. The default lets in this machine alone; "
            "0.0.0.0 lets in everyone who reaches it.",
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port.")] = 7860,
) -> None:
    """Serve a page to sample from a run and to invert images; needs jkoflow[explore]."""
    import dataclasses
    import threading

    from pipeline.cli.session import make_accelerator, replace_given
    from pipeline.explore.app import Address, serve
    from pipeline.explore.explorer import Explorer
    from pipeline.runs.run import open_run
    from pipeline.runtime.console import say
    from pipeline.sampling.sampling_plan import SamplingPlan, with_guidance

    address = Address(host, port)
    address.require_free()
    opened = open_run(run, images=True)
    settings = with_guidance(opened.config.generate, guidance, guide, refiner)
    SamplingPlan.open(opened, settings)  # a mistake is an error here, not on the page
    opened = replace_given(opened, config=dataclasses.replace(opened.config, generate=settings))
    explorer = Explorer(opened, make_accelerator().device, str(run))
    explorer.warm_up()
    _, url = serve(explorer, address)
    say("stop the explorer with Ctrl-C")
    print(url, flush=True)
    threading.Event().wait()
