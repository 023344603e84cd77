"""`jkoflow autoencoder train | evaluate | convert`: the commands alone.

The modules that do the work are imported when a command runs, so that `--help` stays quick.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.errors import UserError

_Config = Annotated[
    str, typer.Option("--config", "-c", help="A packaged configuration, or the path of a .yaml.")
]
_Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override: section.key=value; may be given several times."),
]
_Out = Annotated[Path | None, typer.Option("--out", help="Folder; default runs/autoencoder-NAME.")]


group = typer.Typer(
    no_args_is_help=True, help="Train an autoencoder, or measure how well one reconstructs."
)


def train(
    config: _Config,
    out: _Out = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue what is there.")] = False,
    overrides: _Set = None,
) -> None:
    """Train a small VQ or KL autoencoder."""
    from pipeline.autoencoder_training.train import train as train_autoencoder
    from pipeline.cli.session import make_accelerator
    from pipeline.runtime.console import progress_bar

    settings, accelerator = _load(config, overrides), make_accelerator()
    folder = _folder(out, settings.name)
    path = train_autoencoder(settings, folder, accelerator, progress_bar, resume)
    if accelerator.is_main_process:
        print(path)


def evaluate(
    config: _Config,
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
    out: _Out = None,
    overrides: _Set = None,
) -> None:
    """Measure an autoencoder: rFID, PSNR, SSIM, codebook use, and a before/after picture."""
    from pipeline.autoencoder_training.evaluate import evaluate as evaluate_autoencoder
    from pipeline.autoencoder_training.train import WEIGHTS
    from pipeline.cli.session import make_accelerator
    from pipeline.config.schema import EncoderConfig
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
    from pipeline.config.autoencoder_recipe import AutoencoderConfig
    from pipeline.config.load import load

    return load(AutoencoderConfig, config, overrides or [], packaged.AUTOENCODERS)


def _folder(out: Path | None, name: str) -> Path:
    return out or Path("runs") / f"autoencoder-{name}"


def convert(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CKPT", help="A .ckpt or .safetensors of taming or LDM.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The .safetensors to write.")],
    description: Annotated[
        Path, typer.Option("--yaml", help="The model.yaml (config.yaml) that belongs to it.")
    ],
    image_shape: Annotated[
        str | None,
        typer.Option(
            "--image-shape",
            help="C,H,W of your images, as 3,32,32; default the yaml's resolution.",
        ),
    ] = None,
    averaged: Annotated[
        bool, typer.Option("--averaged", help="Take the moving averages (model_ema.*).")
    ] = False,
    half: Annotated[
        bool, typer.Option("--half", help="Store half precision: half the size, rounded.")
    ] = False,
) -> None:
    """Convert someone else's VQGAN, Gumbel VQGAN or KL checkpoint; no code of it is run."""
    from pipeline.autoencoder_training.convert import convert as convert_checkpoint
    from pipeline.runtime.console import say

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
    """'3,32,32' to (3, 32, 32).

    Raises:
        UserError: anything but three positive numbers.
    """
    if text is None:
        return None
    parts = text.lower().replace("x", ",").split(",")
    if len(parts) != 3 or not all(p.strip().isdigit() and int(p) > 0 for p in parts):
        raise UserError(f"--image-shape takes C,H,W, as 3,32,32, not {text!r}")
    channels, height, width = (int(p) for p in parts)
    return channels, height, width


for verb in (train, evaluate, convert):
    group.command()(verb)
