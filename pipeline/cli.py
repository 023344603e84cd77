"""The command line: every verb stands on its own, and verbs are joined only by files."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from pipeline import (
    autoencoder_verb,
    distill_verb,
    export_verb,
    likelihood_verb,
    report_verb,
    sampling_verbs,
    toy2d,
)
from pipeline.errors import UserError
from pipeline.options import ConfigOption, SetOption
from pipeline.terminal import (
    INTERRUPTED,
    Meter,
    bar,
    explain,
    fail,
    load,
    override,
    say,
    with_section,
)
from pipeline.terminal import accelerator as _accelerator

app = typer.Typer(
    name="jkoflow",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help=(
        "Images in, a generator of images and its FID out: encode to latents, train a block-wise "
        "neural-ODE flow (JKO-iFlow), generate, evaluate. Try `jkoflow demo` first."
    ),
)

_TYPER_INTERRUPTED = 130  # what newer typer returns in place of raising KeyboardInterrupt


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(version("jkoflow"))
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print the version and stop.",
            callback=_print_version,
            is_eager=True,  # before typer misses a command
        ),
    ] = False,
) -> None:
    """Options that stand before the command; see `--help`."""


@app.command()
def demo(
    run: Annotated[Path, typer.Option("--run", help="Where the run goes.")] = Path("runs/demo"),
    config: ConfigOption = "demo",
    overrides: SetOption = None,
) -> None:
    """The main job on MNIST, start to finish: latents, flow, grid, FID. Repeats nothing."""
    from pipeline.demo import run_demo

    run_demo(load(config, overrides), run, _accelerator(), bar)


@app.command()
def fetch(
    assets: Annotated[list[str], typer.Argument(help="mnist, cifar10 or inception; several.")],
    source: Annotated[
        Path | None, typer.Option("--from", help="A file or folder that holds the asset.")
    ] = None,
) -> None:
    """Fetch assets, verify them, and print where they lie."""
    from pipeline import assets as store

    for name in assets:
        print(store.fetch(name, local=source, log=say))


@app.command()
def encode(config: ConfigOption, overrides: SetOption = None) -> None:
    """Encode a data set into the latent cache; resumes where it was interrupted."""
    from pipeline import latents

    accelerator = _accelerator()
    cache = latents.encode(load(config, overrides), accelerator, bar)
    if accelerator.is_main_process:
        say(f"{len(cache)} latents of shape {tuple(cache.shape)}")
        print(cache.reader.folder)


@app.command()
def train(
    config: Annotated[
        str | None, typer.Option("--config", "-c", help="A packaged name or a .yaml path.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option("--run", "-r", help="Run directory; default runs/NAME.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a run, or train it further.")
    ] = False,
    max_minutes: Annotated[
        float | None, typer.Option("--max-minutes", help="Stop cleanly after so long.")
    ] = None,
    reparameterize: Annotated[
        int | None,
        typer.Option(help="Train so many more times over, evening out the movements (in all)."),
    ] = None,
    refine: Annotated[
        int | None, typer.Option(help="Then split every block into so many (in all); train on.")
    ] = None,
    add_blocks: Annotated[
        int, typer.Option(help="Add so many blocks to a finished run, before its free block.")
    ] = 0,
    from_block: Annotated[
        int | None, typer.Option(help="Train this block (from 0) and all after it again.")
    ] = None,
    init_from: Annotated[
        str | None,
        typer.Option(
            "--init-from",
            help="Start each block from the weights of this run's, such as jko from lfm blocks, "
            "or a wider network from a narrow one.",
        ),
    ] = None,
    overrides: SetOption = None,
) -> None:
    """Train the flow block by block: latent cache to run directory."""
    from pipeline import runs, training
    from pipeline.shipped import is_shipped

    anew = bool(add_blocks) or from_block is not None
    if config is not None:
        settings = load(config, overrides)
    elif run is None or not (resume or anew):
        raise UserError("give --config, or --run with --resume to continue a run")
    else:
        later = tuple(f"{name}=" for name in (*training.LATER, training.MOVED))
        if not anew and not all(given.startswith(later) for given in overrides or []):
            raise UserError(
                "--set goes with --config; a resumed run keeps its configuration, but for "
                + ", ".join(key.rstrip("=") for key in later)
            )
        settings = override(runs.read_config(run), overrides, (*training.FREE, training.MOVED))
    start = init_from
    if start is None and config is not None:  # a run on disk keeps the path as it was started
        start = settings.train.init_from
    if start is not None and not is_shipped(start):
        start = str(Path(start).expanduser().resolve())
    settings = with_section(settings, "train", max_minutes=max_minutes, init_from=start)
    settings = with_section(settings, "schedule", reparameterize=reparameterize, refine=refine)
    folder = run if run is not None else Path("runs") / settings.name
    accelerator = _accelerator()
    outcome = training.train(
        settings, folder, accelerator, bar, resume, add_blocks=add_blocks, from_block=from_block
    )
    if accelerator.is_main_process:
        state = "finished" if outcome.complete else "stopped in time; continue with --resume"
        times = f" in pass {outcome.passes - 1}" if outcome.passes > 1 else ""
        say(f"{outcome.blocks} blocks{times}, {outcome.trained} trained now: {state}")
        print(folder)


sampling_verbs.register(app)


@app.command()
def fid(
    a: Annotated[str, typer.Argument(help="A folder, a .npz, or a reference (also your own).")],
    b: Annotated[str, typer.Argument(help="Another.")],
) -> None:
    """FID of two sets of images or statistics; the number alone on the last line of stdout."""
    from eval.references import available
    from pipeline.fid import fid_between

    say(f"shipped references: {', '.join(available()) or 'none'}")
    process = _accelerator()
    with Meter() as meter:
        value = fid_between(a, b, process, meter.of)
    if process.is_main_process:
        print(repr(value))


@app.command()
def reference(
    config: ConfigOption,
    out: Annotated[Path, typer.Argument(help="The .safetensors to write.")],
    test: Annotated[
        list[int] | None,
        typer.Option("--test", help="Note the FID of so many real test images; several."),
    ] = None,
    overrides: SetOption = None,
) -> None:
    """Make reference statistics of a split (data.split), as they are shipped; resumes."""
    from pipeline.reference import make_reference

    settings = load(config, overrides)
    process = _accelerator()
    make_reference(settings, out, test or [], process, bar)
    if process.is_main_process:
        print(out)


# verbs that live in modules of their own
autoencoder_verb.register(app)
likelihood_verb.register(app)
export_verb.register(app)
report_verb.register(app)
distill_verb.register(app)
toy2d.register(app)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (0 done, 2 the caller's mistake, 1 else)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [word for word in given if word != "--debug"]
    try:
        code = app(given, standalone_mode=False)
        if code == _TYPER_INTERRUPTED:
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except KeyboardInterrupt:
        return fail(INTERRUPTED, 1)
    except Exception as error:  # noqa: BLE001 - the border: every error becomes one sentence
        if debug:
            traceback.print_exc()
        return fail(*explain(error))
