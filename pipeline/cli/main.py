"""The command `jkoflow`: its subcommands, and exit codes for errors.

Subcommands communicate through files only. `jkoflow` and `python -m pipeline` are the same
command; `jkoflow` is the safe form in a folder that has a `pipeline/` of its own, which
`python -m` would import instead.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from pipeline.cli import (
    autoencoder,
    configuration,
    data,
    demo,
    evaluation,
    experiments,
    publishing,
    training,
)
from pipeline.cli.sampling import generate, inversion
from pipeline.cli.session import discard_temporaries, explain, fail_once, on_device
from pipeline.runtime import heartbeat, signals

app = typer.Typer(
    name="jkoflow",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help=(
        "Encode images to latents, train a block-wise neural-ODE flow (JKO-iFlow) on them, "
        "generate images and evaluate their FID. Try `jkoflow demo` first."
    ),
)

_TYPER_INTERRUPTED = 130  # newer typer returns this instead of raising KeyboardInterrupt


def _print_version(requested: bool) -> None:
    """Print the version and exit if it is requested."""
    if requested:
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
            help="Print the version and exit.",
            callback=_print_version,
            is_eager=True,  # before typer reports a missing command
        ),
    ] = False,
) -> None:
    """Accept the options that precede a subcommand."""


#: name → function of every command, in the order of `--help`
COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo.demo_command,
    "fetch": data.fetch_command,
    "plan": configuration.plan_command,
    "encode": data.encode_command,
    "train": training.train_command,
    "generate": generate.generate_command,
    "invert": inversion.invert_command,
    "interpolate": inversion.interpolate_command,
    "edit": inversion.edit_command,
    "evaluate": evaluation.evaluate_command,
    "fid": evaluation.fid_command,
    "metrics": evaluation.metrics_command,
    "reference": evaluation.reference_command,
    "likelihood": evaluation.likelihood_command,
    "export": publishing.export_command,
    "explore": publishing.explore_command,
    "push": publishing.push_command,
    "verify": data.verify_command,
    "report": publishing.report_command,
    "distill": training.distill_command,
    "toy2d": experiments.toy2d_command,
    "bench": experiments.bench_command,
}
#: name → help and commands of every group
GROUPS: dict[str, tuple[str, dict[str, Callable[..., None]]]] = {
    "autoencoder": (
        "Train an autoencoder, measure its reconstructions, or convert a checkpoint.",
        {
            "train": autoencoder.train_autoencoder_command,
            "evaluate": autoencoder.evaluate_autoencoder_command,
            "convert": autoencoder.convert_command,
        },
    ),
    "config": (
        "List, show, explain and compare settings.",
        {
            "list": configuration.list_configurations,
            "show": configuration.show_configuration,
            "keys": configuration.list_keys,
            "diff": configuration.compare_configurations,
        },
    ),
}

#: commands and groups that use no accelerator, and so have no `--device`
_WITHOUT_DEVICE = ("fetch", "export", "push", "convert", "config")

for name, command in COMMANDS.items():
    app.command(name)(command if name in _WITHOUT_DEVICE else on_device(command))
for group_name, (group_help, commands) in GROUPS.items():
    group = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help=group_help)
    for name, command in commands.items():
        idle = {name, group_name} & set(_WITHOUT_DEVICE)
        group.command(name)(command if idle else on_device(command))
    app.add_typer(group, name=group_name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    It is 0, 2 for a mistake of the caller, 128 + n for signal n, or 1 for another failure.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [word for word in given if word != "--debug"]
    restore = signals.install(discard_temporaries)
    try:
        code = app(given, standalone_mode=False)
        if code == _TYPER_INTERRUPTED:
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except signals.Interrupted as stop:
        return fail_once(str(stop), stop.code)
    except KeyboardInterrupt:
        return fail_once(signals.SENTENCE, _TYPER_INTERRUPTED)
    except Exception as error:  # noqa: BLE001 - every error becomes one sentence
        if debug:
            traceback.print_exc()
        if type(error).__name__ == "NoArgsIsHelpError":  # of typer's own copy of click or another
            print(error, file=sys.stderr)
        beating = heartbeat.current()
        if beating is not None and heartbeat.is_broken_connection(error):
            signals.ignore_termination()  # torchrun ends the ranks that are left
            beating.wait_for_verdict()
        return fail_once(*explain(error))
    finally:
        heartbeat.leave()
        restore()
