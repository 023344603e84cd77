"""`jkoflow autoencoder train | evaluate | convert`: the commands alone.

What they do is in `pipeline.autoencoding` and `pipeline.convert`, imported when a command runs,
so that `--help` stays quick.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline import convert

_Config = Annotated[
    str, typer.Option("--config", "-c", help="A packaged configuration, or the path of a .yaml.")
]
_Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override: section.key=value; may be given several times."),
]
_Out = Annotated[Path | None, typer.Option("--out", help="Folder; default runs/autoencoder-NAME.")]


def register(app: typer.Typer) -> None:
    """Add the group of verbs to the command line."""
    group = typer.Typer(
        no_args_is_help=True, help="Train an autoencoder, or measure how well one reconstructs."
    )
    group.command()(train)
    group.command()(evaluate)
    convert.register(group)
    app.add_typer(group, name="autoencoder")


def train(
    config: _Config,
    out: _Out = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue what is there.")] = False,
    overrides: _Set = None,
) -> None:
    """Train a small VQ or KL autoencoder (sections architecture and autoencoder_training)."""
    from pipeline import autoencoding
    from pipeline.terminal import accelerator, bar, load

    settings, processes = load(config, overrides), accelerator()
    path = autoencoding.train(settings, _folder(out, settings.name), processes, bar, resume)
    if processes.is_main_process:
        print(path)


def evaluate(
    config: _Config,
    n: Annotated[int, typer.Option("-n", help="Images of the test split.")] = 10000,
    originals: Annotated[
        bool,
        typer.Option(
            "--originals/--no-originals",
            help="Also rFID against the originals, whose features are made once for all "
            "autoencoders, and the originals' own FID.",
        ),
    ] = True,
    out: _Out = None,
    overrides: _Set = None,
) -> None:
    """Measure an autoencoder: rFID, PSNR, SSIM, codebook use, and a before/after picture."""
    from pipeline import autoencoding
    from pipeline.terminal import accelerator, bar, load

    settings, processes = load(config, overrides), accelerator()
    folder = _folder(out, settings.name)
    path = autoencoding.evaluate(settings, n, folder, processes, bar, originals)
    if processes.is_main_process:
        print(path)


def _folder(out: Path | None, name: str) -> Path:
    return out or Path("runs") / f"autoencoder-{name}"
