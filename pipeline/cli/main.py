"""The command line: every verb stands on its own, and verbs are joined only by files."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli import (
    autoencoder,
    configuration,
    data,
    evaluation,
    publishing,
    sampling,
    toy2d,
    training,
)
from pipeline.cli.options import ConfigOption, SetOption
from pipeline.cli.session import INTERRUPTED, explain, fail, load, make_accelerator
from pipeline.runtime.console import progress_bar

app = typer.Typer(
    name="jkoflow",
    no_args_is_help=True,
    rich_markup_mode=None,
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


def demo(
    run: Annotated[Path, typer.Option("--run", help="Where the run goes.")] = Path("runs/demo"),
    config: ConfigOption = "demo",
    overrides: SetOption = None,
) -> None:
    """The main job on MNIST, start to finish: latents, flow, grid, FID. Repeats nothing."""
    from pipeline.cli.demo import run_demo

    run_demo(load(config, overrides), run, make_accelerator(), progress_bar)


VERBS = (  # in the order of --help
    demo, data.fetch, data.encode, training.train, sampling.generate, evaluation.evaluate,
    evaluation.fid, evaluation.reference, evaluation.likelihood, publishing.export,
    publishing.report, training.distill, toy2d.toy2d,
)  # fmt: skip

for verb in VERBS:
    app.command()(verb)
app.add_typer(autoencoder.group, name="autoencoder")
app.add_typer(configuration.group, name="config")


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
