"""Converts a checkpoint of taming-transformers or latent-diffusion; opens it safely."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

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
        ValueError: the checkpoint or the yaml (see `autoencoders.conversion.official`).
        JkoflowError: what was written does not read back the same.
    """
    import torch

    from autoencoders import weights
    from autoencoders.conversion import official
    from pipeline.storage import atomic

    if out.suffix != ".safetensors":
        raise UserError(f"the output must be named *.safetensors, not {out.name}")
    if out.exists() and checkpoint.exists() and out.samefile(checkpoint):
        raise UserError(f"{out} is the checkpoint itself; choose another name for the output")
    model = official.load_official(checkpoint, description, image_shape, averaged)
    origin = atomic.sha256_file(checkpoint)
    notes = {
        "converted_from": {
            "checkpoint": checkpoint.name,
            "sha256": origin,
            "yaml": description.name,
            "yaml_sha256": atomic.sha256_file(description),
            "weights": "averaged" if averaged else "last",
        }
    }
    dtype = torch.float16 if half else torch.float32
    tensors, metadata = weights.to_tensors(model, dtype, notes)
    digest = atomic.write_tensors(out, tensors, metadata)
    again = weights.load_weights(out)
    if not half and again.fingerprint != model.fingerprint:
        raise JkoflowError(f"{out} does not read back as it was written; check the disk")
    return Converted(out, digest, origin, again)
