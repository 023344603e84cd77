"""`jkoflow fetch` and `jkoflow encode`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import ConfigOption, DryRunOption, SetOption
from pipeline.cli.session import load_settings, make_accelerator
from pipeline.runtime.console import progress_bar, say


def fetch_command(
    assets: Annotated[
        list[str], typer.Argument(help="mnist, cifar10, inception or power; may be repeated.")
    ],
    source: Annotated[
        Path | None,
        typer.Option("--from", help="A file, archive or folder with the asset's files."),
    ] = None,
) -> None:
    """Fetch assets, verify them, and print their paths."""
    from pipeline.assets.fetch import fetch_asset

    for name in assets:
        print(fetch_asset(name, local=source, log=say))


def encode_command(
    config: ConfigOption, overrides: SetOption = None, dry_run: DryRunOption = False
) -> None:
    """Encode a data set into the latent cache; resumes when interrupted."""
    from pipeline.data.latent_cache import encode

    if dry_run:
        from pipeline.dry_run import encode_lines

        return print("\n".join(encode_lines(load_settings(config, overrides))))
    accelerator = make_accelerator()
    cache = encode(load_settings(config, overrides), accelerator, progress_bar)
    if accelerator.is_main_process:
        say(f"{len(cache)} latents of shape {tuple(cache.shape)}")
        print(cache.reader.folder)
