"""Small trainers of autoencoders, and some steps of them."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator

from pipeline.autoencoder_training.trainer import AutoencoderTrainer
from pipeline.config.autoencoder import AutoencoderTraining
from tests.autoencoders.models import blobs, config


def trainer(accelerator: Accelerator, flavour: str = "kl", **recipe: Any) -> AutoencoderTrainer:
    base: dict[str, Any] = {
        "iterations": 40, "batch_size": 8, "lr": 2e-3, "warmup": 2, "adversarial_start": 1000,
        "discriminator_width": 4, "discriminator_layers": 1, "kl_weight": 0.05,
    }  # fmt: skip
    return AutoencoderTrainer(
        config(flavour=flavour), AutoencoderTraining(**base | recipe), accelerator
    )


def run(training: AutoencoderTrainer, steps: int) -> list[dict[str, float]]:
    images, terms = blobs(16), []
    for _ in range(steps):
        drawn = torch.Generator().manual_seed(1000 + training.done)
        rows = torch.randperm(16, generator=drawn)[:8]
        terms.append(training.step(images[rows], drawn))
    return terms
