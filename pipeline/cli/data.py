"""`jkoflow fetch`, `jkoflow encode` and `jkoflow verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import ConfigOption, DryRunOption, SetOption, require_places
from pipeline.cli.session import load_settings, make_accelerator
from pipeline.runtime.console import progress_bar, say

#: dB below which decoded images are hardly those that were encoded
_LEAST_PSNR = 15.0


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
    config: ConfigOption,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Also write the latents to this .npz or .parquet: mean and std of the "
            "posteriors, and labels.",
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            "--precision",
            help="Of the stored latents: fp32, or fp16 or bf16 in half the room; the error is "
            "printed.",
        ),
    ] = None,
    overrides: SetOption = None,
    dry_run: DryRunOption = False,
) -> None:
    """Encode a data set into the latent cache; resumes when interrupted."""
    from pipeline.config.data import LATENTS
    from pipeline.data.encoding import (
        check_precision,
        encode,
        reconstruction_psnr,
        storage_error,
    )
    from pipeline.data.latent_file import require_format, write_latents
    from pipeline.errors import UserError

    settings = load_settings(config, overrides)
    if settings.data.name == LATENTS:
        raise UserError(
            "data.name is latents, which are encoded already; expected images; train on the "
            "latents by `jkoflow train`"
        )
    if out is not None:
        require_format(out)
        require_places(out)
    check_precision(precision)
    if dry_run:
        from pipeline.dry_run import encode_lines

        return print("\n".join(encode_lines(settings, precision)))
    accelerator = make_accelerator()
    cache = encode(settings, accelerator, progress_bar, precision)
    if accelerator.is_main_process:
        psnr = reconstruction_psnr(settings)
        say(f"reconstructions of the first images have a PSNR of {psnr:.1f} dB")
        if psnr < _LEAST_PSNR:
            say(
                f"warning: this autoencoder does not suit these images (expected at least "
                f"{_LEAST_PSNR:g} dB); choose another, or train one by `jkoflow autoencoder train`"
            )
        say(f"{len(cache)} latents of shape {tuple(cache.shape)}")
        if cache.precision != "fp32":
            mean, std = storage_error(settings, cache)
            say(
                f"stored in {cache.precision}: latents differ by {mean:.1e} of a "
                f"channel's standard deviation, posterior deviations by {100 * std:.2g} % (rms)"
            )
        if out is not None:
            write_latents(cache, out)
            say(f"latents are in {out}")
        print(cache.reader.place)


def verify_command(
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            help="Runs, caches, also at addresses such as s3://bucket/NAME, zoo:NAME, assets, or "
            "files of weights and statistics. Default: the installation."
        ),
    ] = None,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair",
            help="Take broken files from the package or a mirror, or make them again as they were "
            "made, which may train; what nothing knows how to make is removed or named.",
        ),
    ] = False,
    as_it_is: Annotated[
        bool, typer.Option("--seal", help="Seal folders of an earlier version as they are.")
    ] = False,
) -> None:
    """Hash every file and compare it with its seal; the exit code is 1 if a file is broken."""
    from pipeline.errors import JkoflowError, UserError
    from pipeline.runs import verify
    from pipeline.storage.remote_files import is_url

    address = next((path for path in paths or [] if is_url(path)), None)
    if address is not None and (repair or as_it_is):
        raise UserError(
            f"{address} is an address; expected a path with --repair and --seal, which change "
            "files; copy the folder of the cache there again"
        )
    if as_it_is:
        if not paths:
            raise UserError("--seal is given without a path; expected a folder; give it")
        if repair:
            raise UserError("--seal and --repair are both given; expected one; leave one out")
        for path in paths:
            print(f"{path}: {verify.seal_as_it_is(Path(path))} files sealed")
        return
    faults = [fault for path in paths or [] for fault in verify.verify(path)]
    if not paths:
        faults = verify.verify_installation()
    left = len(faults)
    for fault in [] if repair else faults:
        print(fault)
    if repair and faults:
        from pipeline.repair.repair import repair as mend
        from pipeline.repair.tools import Tools

        tools = Tools(make_accelerator, progress_bar, [Path(path) for path in paths or []])
        for done in mend(faults, tools):
            print(done.sentence)
            left -= done.whole
    if left:
        raise JkoflowError(
            f"{left} file{'s are' if left > 1 else ' is'} broken; see the list above"
        )
    say(f"{len(faults)} broken files mended" if faults else "every file is whole")
