"""`jkoflow toy2d` and `jkoflow bench`: the paper's two-dimensional experiments and its tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import OptionalConfigOption, ResumeOption, SetOption
from pipeline.errors import UserError

#: folder of the packaged configurations, and prefix of a run directory
FOLDER = "toy2d"


def toy2d_command(
    config: OptionalConfigOption = None,
    run: Annotated[
        Path | None, typer.Option("--run", "-r", help="Run directory; default runs/toy2d-NAME.")
    ] = None,
    resume: ResumeOption = False,
    overrides: SetOption = None,
) -> None:
    """Train a flow on points in the plane, measure and plot it; writes samples/ of the run."""
    from pipeline.cli.session import make_accelerator
    from pipeline.config.load import load_config
    from pipeline.data.one_writer import one_writer
    from pipeline.runs.directory import read_config
    from pipeline.runtime.console import progress_bar, say
    from pipeline.toy2d.experiment import experiment_line, run_experiment

    if config is not None:
        settings = load_config(config, overrides or [], FOLDER)
    elif run is None or not resume:
        raise UserError("--config is missing; give it, or --run with --resume to continue a run")
    elif overrides:
        raise UserError("--set goes with --config; a resumed run keeps its configuration")
    else:
        settings = read_config(run)
    folder = run if run is not None else Path("runs") / f"{FOLDER}-{settings.name}"
    accelerator = make_accelerator()
    with one_writer(folder, "the run at", accelerator):
        metrics = run_experiment(settings, folder, accelerator, progress_bar, resume)
    if metrics is None:
        say("stopped by train.max_minutes; continue with --resume")
    else:
        say(experiment_line(metrics))
    print(folder / "samples")


def bench_command(
    suite: Annotated[
        str,
        typer.Argument(
            help="toy2d (points in the plane), tabular (tables) or images (latents)."
        ),
    ],
    budget: Annotated[
        str,
        typer.Option("--budget", help="Training of every model, such as 60s or 2000batches."),
    ],
    models: Annotated[
        str,
        typer.Option(
            "--models",
            help="Models: jko, lfm, fm, ffjord, otflow, ignn, iresnet and scoresde; also "
            "segments, and maf and nsf with the extra zuko.",
        ),
    ] = "jko,lfm,fm,ffjord,otflow,ignn,iresnet,scoresde",
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="Data sets; default checkerboard,8gaussians,rose,tree, or "
            "power,gas,miniboone,bsds300, or mnist,cifar10. Images take any packaged "
            "configuration of a flow.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", help="Number of seeds, from 0.")] = 3,
    run: Annotated[
        Path | None,
        typer.Option(
            "--run", "-r", help="Folder; default runs/bench-SUITE. Finished rows there are kept."
        ),
    ] = None,
    parameters: Annotated[
        int | None,
        typer.Option(
            "--parameters",
            help="Most parameters of a model; default 35000, 76000 or 200000.",
        ),
    ] = None,
    test: Annotated[
        int | None,
        typer.Option(
            "--test",
            help="Held-out samples that measure the likelihood; default 5000, or 1000 images. "
            "FID has evaluate.n samples.",
        ),
    ] = None,
    tune: Annotated[
        str | None,
        typer.Option(
            "--tune",
            help="Learning rates such as 1e-3,3e-3,1e-2 that are tried for every model with a "
            "quarter of the budget on the first data set; default: train.lr.",
        ),
    ] = None,
    whiten: Annotated[
        bool,
        typer.Option(
            "--whiten",
            help="Train on whitened rows of tables; NLL and MMD² remain those of the rows.",
        ),
    ] = False,
    published: Annotated[
        bool, typer.Option("--published", help="Print the paper's figures below ours.")
    ] = False,
    overrides: SetOption = None,
) -> None:
    """Train models within one budget, compare likelihood, samples and time; adds missing rows."""
    from pipeline.bench.bench import Bench, run_bench
    from pipeline.bench.budget import Budget
    from pipeline.bench.problem import IMAGES_TEST, SUITES, HeldOut
    from pipeline.cli.session import make_accelerator
    from pipeline.data.one_writer import one_writer
    from pipeline.runtime.console import progress_bar

    if suite not in SUITES:
        raise UserError(f"suite {suite!r} is unknown; choose one of {', '.join(SUITES)}")
    if test is None:
        test = IMAGES_TEST if suite == "images" else HeldOut().test
    if test < 2:
        raise UserError(f"--test is {test}; expected at least 2")
    if whiten and suite != "tabular":
        raise UserError(f"--whiten goes with the suite tabular, not {suite}; leave it out")
    bench = Bench(
        suite,
        _names(models),
        _names(data or ""),
        Budget.parse(budget),
        seeds,
        parameters,
        tuple(overrides or ()),
        HeldOut(test=test, whitened=whiten),
        _rates(tune or ""),
    )
    folder = run if run is not None else Path("runs") / f"bench-{suite}"
    accelerator = make_accelerator()
    with one_writer(folder, "the benchmark in", accelerator):
        run_bench(bench, folder, accelerator, progress_bar, published)
    print(folder / "table.md")


def _rates(text: str) -> tuple[float, ...]:
    """Read learning rates with commas between them.

    Raises:
        UserError: one is not a number.
    """
    try:
        return tuple(float(name) for name in _names(text))
    except ValueError as error:
        raise UserError(
            f"--tune is {text!r}; expected learning rates such as 1e-3,3e-3"
        ) from error


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
