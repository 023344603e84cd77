"""`jkoflow train` and `jkoflow distill`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.options import DryRunOption, OptionalConfigOption, SetOption
from pipeline.cli.session import (
    load_settings,
    make_accelerator,
    override_settings,
    replace_in_section,
)
from pipeline.errors import UserError
from pipeline.runtime.console import progress_bar, say

if TYPE_CHECKING:
    from accelerate import Accelerator

    from pipeline.config.schema import Config


def distill_command(
    run: Annotated[
        Path, typer.Option("--run", "-r", help="The teacher: a finished run, or zoo:NAME.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="The new run directory; default NAME-distilled, next to the teacher's folder "
            "NAME; runs/NAME-distilled for zoo:NAME and hf://OWNER/NAME.",
        ),
    ] = None,
    merge: Annotated[int, typer.Option("--merge", help="Consecutive blocks merged into one.")] = 2,
    steps: Annotated[
        int, typer.Option("--steps", help="Solver steps per merged block of the sampler.")
    ] = 1,
    method: Annotated[
        str, typer.Option("--method", help="Solver of the sampler: euler, midpoint, rk4, ….")
    ] = "rk4",
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a run; repeat the other options.")
    ] = False,
    max_minutes: Annotated[
        float, typer.Option("--max-minutes", help="Minutes after which to stop cleanly.")
    ] = 0.0,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Override: section.key=value of train, velocity, sampler, generate or evaluate, "
            "or data.path=DIR; may be repeated. Default: the teacher's network, 5000 iterations "
            "per merged block.",
        ),
    ] = None,
) -> None:
    """Distill a run: merge its blocks into fewer that need few solver steps; writes a run."""
    from pipeline.data.one_writer import one_writer
    from pipeline.distillation.distill import (
        Distillation,
        distill,
        headline,
        student_config,
    )
    from pipeline.runs.directory import read_manifest
    from pipeline.runs.run import open_run
    from pipeline.toy2d.point_source import PointSource

    teacher, out = open_run(run), student_folder(out, run)
    settings = Distillation(merge, steps, method)
    config = student_config(teacher, settings, overrides or [], max_minutes)
    accelerator = make_accelerator()
    source = None if teacher.manifest.autoencoder else PointSource(config)
    words = ["--merge", str(merge), "--steps", str(steps), "--method", method]
    words += [word for value in overrides or [] for word in ("--set", value)]
    with one_writer(out, "the run at", accelerator):
        outcome = distill(
            teacher, out, config, merge, accelerator, progress_bar, resume, source, options=words
        )
    if accelerator.is_main_process:
        if outcome.complete:
            say(headline(read_manifest(out)))
        else:
            say(f"{outcome.blocks} merged blocks: stopped in time; continue with --resume")
        print(out)


def student_folder(out: Path | None, run: Path) -> Path:
    """Return the student's run directory: `--out`, or NAME-distilled next to the teacher."""
    from pipeline.integrity.hub import is_hub
    from pipeline.runs.zoo import PREFIX, is_shipped, zoo

    if out is not None:
        return out
    if is_shipped(run):
        return Path("runs") / f"{str(run).removeprefix(PREFIX)}-distilled"
    if is_hub(run):
        return Path("runs") / f"{run.name}-distilled"
    folder = run.expanduser()
    resolved = folder.resolve()
    if resolved in {path.resolve() for path in zoo().values()}:  # the package stays unchanged
        return Path("runs") / f"{resolved.name}-distilled"
    if folder.name in ("", ".."):  # such as the current directory
        folder = resolved
    return folder.with_name(f"{folder.name}-distilled")


def train_command(
    config: OptionalConfigOption = None,
    run: Annotated[
        Path | None, typer.Option("--run", "-r", help="Run directory; default runs/NAME.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a run, or train it further.")
    ] = False,
    max_minutes: Annotated[
        float | None, typer.Option("--max-minutes", help="Minutes after which to stop cleanly.")
    ] = None,
    iterations: Annotated[
        int | None,
        typer.Option(help="Optimiser steps per block; --resume may lower them."),
    ] = None,
    reparameterize: Annotated[
        int | None,
        typer.Option(help="Number of later passes, in all, with steps that even out movements."),
    ] = None,
    refine: Annotated[
        int | None,
        typer.Option(
            help="Number of children, in all, that replace every block but the free one."
        ),
    ] = None,
    add_blocks: Annotated[
        int, typer.Option(help="Number of blocks to add to a finished run, before its free block.")
    ] = 0,
    init_from: Annotated[
        str | None,
        typer.Option(
            "--init-from",
            help="A run whose blocks initialise the weights of the new blocks, such as lfm blocks "
            "for jko, or a narrower network.",
        ),
    ] = None,
    network: Annotated[
        int | None,
        typer.Option(
            "--network",
            help="Train one network of velocity.nets alone, from 0, under fm. Others may train at "
            "the same time; `jkoflow train` without this option then joins them.",
        ),
    ] = None,
    measure_noise: Annotated[
        bool,
        typer.Option(
            "--measure-noise",
            help="Print the critical batch size of every finished block, and train nothing.",
        ),
    ] = False,
    overrides: SetOption = None,
    dry_run: DryRunOption = False,
) -> None:
    """Train a flow on a latent cache, block by block; writes a run directory."""
    from pipeline.config.keys import keys, resume_rule
    from pipeline.config.schema import Config
    from pipeline.data.one_writer import one_writer
    from pipeline.runs.directory import read_config
    from pipeline.runs.zoo import is_shipped
    from pipeline.runtime.devices import warn_of_slow_bf16
    from pipeline.training.train import train

    if network is not None and (add_blocks or measure_noise):
        other = "--add-blocks" if add_blocks else "--measure-noise"
        raise UserError(f"{other} has no meaning for one network; leave it or --network out")
    if measure_noise and (add_blocks or init_from or dry_run):
        other = "--add-blocks" if add_blocks else "--init-from" if init_from else "--dry-run"
        raise UserError(f"{other} has no meaning for --measure-noise; leave one of them out")
    overrides = list(overrides or [])
    later = {"jko.reparameterize": reparameterize, "jko.refine": refine}
    later["train.iterations"] = iterations
    overrides += [f"{key}={value}" for key, value in later.items() if value is not None]
    if config is not None:
        settings = load_settings(config, overrides)
    elif run is not None and measure_noise:
        if is_shipped(run):
            raise UserError(
                f"{run} is shipped without the samples that its blocks were trained on; expected "
                "a run directory; train one first"
            )
        allowed = ["train", "jko", "matching"]
        settings = override_settings(read_config(run), overrides, allowed)
    elif run is None or not (resume or add_blocks):
        raise UserError(
            "--config is missing; give it, or --run with --resume to continue a run, or with "
            "--measure-noise"
        )
    else:
        rules = ("later", "moved", "lowered", *(("added",) if add_blocks else ()))
        allowed = [name for name in keys(Config) if resume_rule(name, Config) in rules]
        settings = override_settings(read_config(run), overrides, allowed)
    if init_from is None and config is not None:  # a resumed run keeps the path of its start
        init_from = settings.train.init_from
    if init_from is not None and not is_shipped(init_from):
        init_from = str(Path(init_from).expanduser().resolve())
    settings = replace_in_section(settings, "train", max_minutes=max_minutes, init_from=init_from)
    folder = run if run is not None else Path("runs") / settings.name
    if dry_run:
        from pipeline.dry_run import train_lines

        return print("\n".join(train_lines(settings, folder, add_blocks, network)))
    accelerator = make_accelerator(shards=True)
    warn_of_slow_bf16(settings.train.precision, accelerator)
    if measure_noise:
        with one_writer(folder, "the run at", accelerator):
            return _print_noise(settings, folder, accelerator)
    if network is not None:
        return _train_network(settings, folder, accelerator, network, resume)
    with one_writer(folder, "the run at", accelerator):
        outcome = train(settings, folder, accelerator, progress_bar, resume, add_blocks=add_blocks)
    if accelerator.is_main_process:
        state = "finished" if outcome.complete else "stopped in time; continue with --resume"
        if outcome.spared:
            state += (
                f"; planned were {outcome.blocks + outcome.spared} blocks, but one moved the "
                "samples by less than schedule.tolerance"
            )
        times = f" in pass {outcome.passes - 1}" if outcome.passes > 1 else ""
        say(f"{outcome.blocks} blocks{times}, {outcome.trained} trained now: {state}")
        print(folder)


def _train_network(
    settings: Config, folder: Path, accelerator: Accelerator, network: int, resume: bool
) -> None:
    """Train a network alone, and say what is left to do."""
    from pipeline.runs.directory import RunDirectory
    from pipeline.runs.networks import unfinished_networks
    from pipeline.training.networks.train_network import train_network

    finished = train_network(settings, folder, accelerator, progress_bar, resume, network)
    if accelerator.is_main_process:
        left = unfinished_networks(folder, settings.velocity.nets)
        state = "finished" if finished else "stopped in time; continue with --resume"
        if left and finished:
            state += f"; {len(left)} of {settings.velocity.nets} are left"
        elif finished:
            state += f"; join all by `{RunDirectory(folder).resume_command}`"
        say(f"network {network}: {state}")
        print(folder)


def _print_noise(settings: Config, folder: Path, accelerator: Accelerator) -> None:
    """Print the noise of the gradient of every finished block, as a table."""
    from pipeline.training.gradient_noise import measure_gradient_noise

    drawn = "probes" if settings.jko is not None else "times and noise"
    for row in measure_gradient_noise(settings, folder, accelerator, progress_bar):
        if row.block == 0:
            print(f"block  critical batch (samples)  share of {drawn}")
        critical = f"{row.critical_batch:.1f} ± {row.error:.1f}"
        print(f"{row.block:5}  {critical:>24}  {row.drawn:.2f}")
