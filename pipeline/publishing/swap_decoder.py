"""Swap of the decoder: a run gets an autoencoder with the same encoder and a better decoder.

`autoencoder train` with `decoder_only` keeps the latents, so flows on them need no training.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from autoencoders.base import Moments
from autoencoders.weights import shipped_weights
from pipeline.errors import UserError
from pipeline.runs.run import Run
from pipeline.runtime.rng import generator

_IMAGES = 8
_TOLERANCE = 1e-3


@torch.inference_mode()
def with_decoder(run: Run, weights: str) -> Run:
    """Return a run with the decoder of another autoencoder, named as in `build_autoencoder`.

    Raises:
        UserError: the other autoencoder is not available, or its encoder gives other latents.
    """
    known = run.manifest.require_autoencoder()
    if weights not in shipped_weights() and Path(weights).exists():
        weights = str(Path(weights).resolve())  # a bare name could name a file in the run
    try:
        other = run.build_autoencoder(weights)
    except (ValueError, OSError) as error:
        raise UserError(f"--autoencoder: {error}") from error
    own = run.autoencoder()
    shape = (_IMAGES, *known.image_shape)
    images = 2 * torch.rand(shape, generator=generator("redecoding")) - 1
    if other.latent_shape != own.latent_shape or not _same(
        own.encode(images), other.encode(images)
    ):
        raise UserError(
            f"--autoencoder {weights} gives other latents than {known.weights}, on which the "
            f"run at {run.name} was trained; use one with the same encoder (trained with "
            "training.decoder_only), or encode and train again"
        )
    record = dataclasses.replace(known, weights=weights, fingerprint=other.fingerprint)
    return dataclasses.replace(
        run,
        config=dataclasses.replace(
            run.config, autoencoder=dataclasses.replace(run.config.autoencoder, weights=weights)
        ),
        manifest=dataclasses.replace(run.manifest, autoencoder=record),
    )


def _same(a: Moments, b: Moments) -> bool:
    """Whether two encoders agree up to rounding."""
    if (a.log_var is None) != (b.log_var is None):
        return False
    pairs = [(a.mean, b.mean)]
    if a.log_var is not None and b.log_var is not None:
        pairs.append((a.log_var, b.log_var))
    return all(torch.allclose(x, y, rtol=_TOLERANCE, atol=_TOLERANCE) for x, y in pairs)
