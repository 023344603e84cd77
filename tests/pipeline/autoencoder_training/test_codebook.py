"""The codebook of an autoencoder in training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from autoencoders.base import to_float
from autoencoders.taming import TamingAutoencoder
from pipeline.autoencoder_training.trainer import initialise_codebook
from tests.autoencoders.models import blobs, config, model
from tests.pipeline.autoencoder_training.trainers import trainer
from tests.processes import run_job


def distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Exact ones: the default works by matrix products, which round small distances."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def test_entries_start_at_latent_vectors() -> None:
    autoencoder = model(flavour="vq", n_embed=64)
    latents = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(3))
    initialise_codebook(autoencoder, latents, torch.Generator().manual_seed(0))
    assert autoencoder.quantize is not None
    points = {tuple(v.tolist()) for v in latents.permute(0, 2, 3, 1).reshape(-1, 2)}
    entries = {tuple(v.tolist()) for v in autoencoder.quantize.embedding.weight}
    assert entries <= points and len(entries) > 30
    for flavour in ("kl", "gumbel"):
        other = TamingAutoencoder(config(flavour=flavour, z_channels=2))
        with pytest.raises(ValueError, match=f"flavour is {flavour}; expected vq"):
            initialise_codebook(other, latents, torch.Generator())


def test_a_codebook_starts_on_the_first_batch(accelerator: Accelerator) -> None:
    training = trainer(accelerator, "vq", lr=1e-12, ema=0.0)
    drawn = torch.Generator().manual_seed(0)
    with torch.no_grad():
        latents = training.model.encode(to_float(blobs(8))).mean
    training.step(blobs(8), drawn)
    assert training.model.quantize is not None
    points = latents.permute(0, 2, 3, 1).reshape(-1, 2)
    entries = training.model.quantize.embedding.weight.detach()
    assert distances(entries, points).amin(1).max() < 1e-5
    averaged = training.average.average["quantize.embedding.weight"]
    assert distances(averaged, points).amin(1).max() < 1e-5


def test_half_precision_takes_the_entries_as_they_are(accelerator: Accelerator) -> None:
    training = trainer(accelerator, "vq", precision="bf16")
    training.step(blobs(8), torch.Generator().manual_seed(0))
    quantizer = training.model.quantize
    assert quantizer is not None
    x = to_float(blobs(8))
    with training.loss.autocast(x.device):
        z, _, _ = training.loss.latents(x, torch.zeros(()), training.done)
    points = z.detach().permute(0, 2, 3, 1).reshape(-1, 2)
    entries = quantizer.embedding.weight.detach()
    assert distances(entries, points).amin(0).max() < 1e-6  # bfloat16 would be off by 1e-3


def test_on_many_processes_the_codebook_is_that_of_the_first(tmp_path: Path) -> None:
    """Its entries are latents of the first process's images, not means of unrelated ones."""
    first, second = run_job("codebook", tmp_path)
    assert first["entries"] == second["entries"]
    entries, latents = torch.tensor(first["entries"]), torch.tensor(first["latents"])
    assert distances(entries, latents).amin(1).max() < 1e-5
