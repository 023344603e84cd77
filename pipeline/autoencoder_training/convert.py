"""Safe conversion of a checkpoint of taming-transformers, latent-diffusion or diffusers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from autoencoders import weights
from autoencoders.conversion import diffusers_layout, official
from autoencoders.taming import TamingAutoencoder
from pipeline.errors import JkoflowError, UserError
from pipeline.storage import atomic


@dataclass(frozen=True)
class Conversion:
    """Written file with its sha256 and that of the checkpoint, and the autoencoder in it."""

    path: Path
    sha256: str
    source_sha256: str
    model: TamingAutoencoder


def convert_checkpoint(
    checkpoint: Path,
    out: Path,
    description: Path | None,
    image_shape: tuple[int, int, int] | None = None,
    averaged: bool = False,
    half: bool = False,
) -> Conversion:
    """Write an official checkpoint as safetensors with its architecture and origin.

    The written file is loaded again, and must hold the same weights. `half` stores half precision.
    A folder of diffusers describes itself. The other arguments are those of
    `autoencoders.conversion.official.load_official`.

    Raises:
        UserError: `out` has another suffix, or is the checkpoint; the description is missing, or
            a folder has one.
        ValueError: the checkpoint or the yaml is invalid.
        JkoflowError: the written file holds other weights.
    """
    if out.suffix != ".safetensors":
        raise UserError(f"the output is named {out.name}; expected *.safetensors")
    _require_another(out, checkpoint)
    if checkpoint.is_dir():
        if description is not None or averaged:
            raise UserError(
                f"{checkpoint} is a folder of diffusers, which describes itself and has one set "
                "of weights; remove --yaml and --averaged"
            )
        folder = diffusers_layout.find_folder(checkpoint)
        _require_another(out, folder / diffusers_layout.WEIGHTS)
        model = diffusers_layout.load_folder(checkpoint, image_shape)
        checkpoint, description = (
            folder / diffusers_layout.WEIGHTS, folder / diffusers_layout.CONFIG
        )
    elif description is None:
        raise UserError(
            "--yaml is missing; expected the model.yaml of the checkpoint; a folder of diffusers "
            "needs none"
        )
    else:
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
    written = weights.load_weights(out)
    if not half and written.fingerprint != model.fingerprint:
        raise JkoflowError(f"{out} holds other weights than were written; check the disk")
    return Conversion(out, digest, origin, written)


def _require_another(out: Path, checkpoint: Path) -> None:
    """Raise UserError if the output would replace the checkpoint."""
    if out.exists() and checkpoint.exists() and out.samefile(checkpoint):
        raise UserError(f"the output {out} is the checkpoint; choose another name")
