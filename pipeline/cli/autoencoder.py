"""`jkoflow autoencoder train`, `evaluate` and `convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli.options import ConfigOption, ResumeOption, SetOption, require_places
from pipeline.errors import UserError

OutOption = Annotated[
    Path | None, typer.Option("--out", help="Folder; default runs/autoencoder-NAME.")
]


def train_autoencoder_command(
    config: ConfigOption,
    out: OutOption = None,
    resume: ResumeOption = False,
    overrides: SetOption = None,
) -> None:
    """Train a small VQ or KL autoencoder."""
    from pipeline.autoencoder_training.train import train_autoencoder
    from pipeline.cli.session import make_accelerator
    from pipeline.data.one_writer import one_writer
    from pipeline.runtime.console import progress_bar
    from pipeline.runtime.devices import warn_of_slow_bf16

    settings, accelerator = _load(config, overrides), make_accelerator()
    warn_of_slow_bf16(settings.training.precision, accelerator)
    folder = _folder(out, settings.name)
    with one_writer(folder, "the training at", accelerator):
        path = train_autoencoder(settings, folder, accelerator, progress_bar, resume)
    if accelerator.is_main_process:
        print(path)


def evaluate_autoencoder_command(
    config: ConfigOption,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            help="A shipped name or a path; default what was trained in --out, or else the "
            "shipped weights of the configuration's name.",
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            help="A shipped name, a folder, a .npz, or a file of `reference`; default DATA-train.",
        ),
    ] = None,
    n: Annotated[int, typer.Option("-n", help="Images of the test split.")] = 10000,
    kind: Annotated[
        str, typer.Option("--kind", help="pretrained, identity or diffusers.")
    ] = "pretrained",
    fit: Annotated[
        str,
        typer.Option("--fit", help="Images of another shape: exact (refuse), native or resize."),
    ] = "exact",
    originals: Annotated[
        bool,
        typer.Option(
            "--originals/--no-originals",
            help="Also rFID against the originals, whose features are made once for all "
            "autoencoders, and the originals' own FID.",
        ),
    ] = True,
    out: OutOption = None,
    overrides: SetOption = None,
) -> None:
    """Measure an autoencoder: rFID, PSNR, SSIM, codebook use, and a picture of both."""
    from pipeline.autoencoder_training.evaluate import evaluate_autoencoder
    from pipeline.autoencoder_training.train import WEIGHTS
    from pipeline.cli.session import make_accelerator
    from pipeline.config.data import EncoderConfig
    from pipeline.runtime.console import progress_bar

    settings, accelerator = _load(config, overrides), make_accelerator()
    folder = _folder(out, settings.name)
    if weights is None and kind == "pretrained":
        trained = folder / WEIGHTS
        weights = str(trained) if trained.is_file() else settings.name
    encoder = EncoderConfig(name=kind, weights=weights, fit=fit)  # type: ignore[arg-type]
    reference = reference or f"{settings.data.name}-train"
    path = evaluate_autoencoder(
        settings.data, encoder, reference, n, folder, accelerator, progress_bar, originals
    )
    if accelerator.is_main_process:
        print(path)


def _load(config: str, overrides: list[str] | None) -> Any:  # noqa: ANN401 - imported late
    from pipeline.config import packaged
    from pipeline.config.autoencoder import AutoencoderConfig
    from pipeline.config.load import load

    return load(AutoencoderConfig, config, overrides or [], packaged.AUTOENCODERS)


def _folder(out: Path | None, name: str) -> Path:
    """Return the output folder: `--out`, or runs/autoencoder-NAME."""
    return out or Path("runs") / f"autoencoder-{name}"


def convert_command(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CKPT",
            help="A .ckpt or .safetensors of taming or LDM, or a folder of diffusers.",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The .safetensors to write.")],
    description: Annotated[
        Path | None,
        typer.Option(
            "--yaml",
            help="The model.yaml (config.yaml) of a checkpoint; a folder has its own.",
        ),
    ] = None,
    image_shape: Annotated[
        str | None,
        typer.Option(
            "--image-shape",
            help="C,H,W of your images, such as 3,32,32; default: the resolution of the yaml.",
        ),
    ] = None,
    averaged: Annotated[
        bool, typer.Option("--averaged", help="Convert the averaged weights (model_ema.*).")
    ] = False,
    half: Annotated[
        bool, typer.Option("--half", help="Store float16 weights: half the size, rounded.")
    ] = False,
) -> None:
    """Convert a VQGAN, Gumbel VQGAN or KL checkpoint; runs no code of the checkpoint."""
    from pipeline.autoencoder_training.convert import convert_checkpoint
    from pipeline.runtime.console import say

    require_places(out)
    shape = parse_shape(image_shape)
    done = convert_checkpoint(checkpoint, out, description, shape, averaged, half)
    model = done.model
    count = sum(p.numel() for p in model.parameters())
    say(f"{model.config.flavour} autoencoder, {count:,} parameters")
    say(f"images {tuple(model.image_shape)} to latents {tuple(model.latent_shape)}")
    say(f"checkpoint sha256 {done.source_sha256}")
    say(f"use it with --set autoencoder.weights={out}")
    print(out)


def parse_shape(text: str | None) -> tuple[int, int, int] | None:
    """Convert '3,32,32' to (3, 32, 32); None stays None.

    Raises:
        UserError: the text is not three positive integers.
    """
    if text is None:
        return None
    parts = text.lower().replace("x", ",").split(",")
    if len(parts) != 3 or not all(p.strip().isdigit() and int(p) > 0 for p in parts):
        raise UserError(f"--image-shape is {text!r}; expected C,H,W such as 3,32,32")
    channels, height, width = (int(p) for p in parts)
    return channels, height, width
