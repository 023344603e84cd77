"""The codebook while an autoencoder is trained."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator

from autoencoders.base import to_float
from tests.autoencoders.models import blobs
from tests.pipeline.autoencoder_training.trainers import trainer
from tests.processes import run_job


def distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Exact ones: the default works by matrix products, which round small distances."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def test_a_codebook_starts_on_the_first_batch(accelerator: Accelerator) -> None:
    made = trainer(accelerator, "vq", lr=1e-12, ema=0.0)
    drawn = torch.Generator().manual_seed(0)
    with torch.no_grad():
        latents = made.model.encode(to_float(blobs(8))).mean
    made.step(blobs(8), drawn)
    assert made.model.quantize is not None
    points = latents.permute(0, 2, 3, 1).reshape(-1, 2)
    entries = made.model.quantize.embedding.weight.detach()
    assert distances(entries, points).amin(1).max() < 1e-5
    averaged = made.average.average["quantize.embedding.weight"]
    assert distances(averaged, points).amin(1).max() < 1e-5


def test_half_precision_takes_the_entries_as_they_are(accelerator: Accelerator) -> None:
    made = trainer(accelerator, "vq", precision="bf16")
    made.step(blobs(8), torch.Generator().manual_seed(0))
    quantizer = made.model.quantize
    assert quantizer is not None
    with made._autocast():
        z, _, _ = made._latents(to_float(blobs(8)), torch.zeros(()))
    points = z.detach().permute(0, 2, 3, 1).reshape(-1, 2)
    entries = quantizer.embedding.weight.detach()
    assert distances(entries, points).amin(0).max() < 1e-6  # bfloat16 would be off by 1e-3


def test_on_many_processes_the_codebook_is_that_of_the_first(tmp_path: Path) -> None:
    """Its entries are latents of the first process's images, not means of unrelated ones."""
    first, second = run_job("codebook", tmp_path)
    assert first["entries"] == second["entries"]
    entries, latents = torch.tensor(first["entries"]), torch.tensor(first["latents"])
    assert distances(entries, latents).amin(1).max() < 1e-5
