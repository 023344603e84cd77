"""`jkoflow autoencoder convert`: someone else's checkpoint, opened safely, in the clean form.

The command is defined here and joins the command line through `register`; everything heavy is
imported when it runs, so that `--help` stays quick.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.errors import JkoflowError, UserError

if TYPE_CHECKING:
    from autoencoders.taming import TamingAutoencoder


@dataclass(frozen=True)
class Converted:
    """A finished conversion.

    Attributes:
        path: the written file.
        sha256: of its content.
        source_sha256: of the checkpoint it was made from.
        model: the autoencoder, read back from the written file.
    """

    path: Path
    sha256: str
    source_sha256: str
    model: TamingAutoencoder


def convert(
    checkpoint: Path,
    out: Path,
    description: Path,
    image_shape: tuple[int, int, int] | None = None,
    averaged: bool = False,
    half: bool = False,
) -> Converted:
    """Write an official checkpoint as safetensors with its architecture and origin.

    The written file is loaded again, and must give the very weights that were read.

    Args:
        checkpoint: .ckpt or .safetensors, of a first stage or of a whole model.
        out: a .safetensors file, for `autoencoder.weights`.
        description: the model.yaml.
        image_shape: (C, H, W) of the images; None takes the yaml's resolution.
        averaged: take the moving averages kept in the checkpoint.
        half: store half precision.

    Raises:
        UserError: `out` is no .safetensors name, or is the checkpoint.
        ValueError: the checkpoint or the yaml (see `autoencoders.official`).
        JkoflowError: what was written does not read back the same.
    """
    import torch

    from autoencoders import official, weights
    from pipeline import commit

    if out.suffix != ".safetensors":
        raise UserError(f"the output must be named *.safetensors, not {out.name}")
    if out.exists() and checkpoint.exists() and out.samefile(checkpoint):
        raise UserError(f"{out} is the checkpoint itself; choose another name for the output")
    model = official.load(checkpoint, description, image_shape, averaged)
    origin = commit.sha256_file(checkpoint)
    notes = {
        "converted_from": {
            "checkpoint": checkpoint.name,
            "sha256": origin,
            "yaml": description.name,
            "yaml_sha256": commit.sha256_file(description),
            "weights": "averaged" if averaged else "last",
        }
    }
    dtype = torch.float16 if half else torch.float32
    tensors, metadata = weights.to_tensors(model, dtype, notes)
    digest = commit.write_tensors(out, tensors, metadata)
    again = weights.load(out)
    if not half and again.fingerprint != model.fingerprint:
        raise JkoflowError(f"{out} does not read back as it was written; check the disk")
    return Converted(out, digest, origin, again)


def register(app: typer.Typer) -> None:
    """Add the verb `convert` to the `autoencoder` command."""
    app.command("convert")(_command)


def _command(
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
    done = convert(checkpoint, out, description, parse_shape(image_shape), averaged, half)
    model = done.model
    count = sum(p.numel() for p in model.parameters())
    _say(f"{model.config.flavour} autoencoder, {count:,} parameters")
    _say(f"images {tuple(model.image_shape)} to latents {tuple(model.latent_shape)}")
    _say(f"checkpoint sha256 {done.source_sha256}")
    _say(f"use it with --set autoencoder.weights={out}")
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


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
