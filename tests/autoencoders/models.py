"""Small autoencoders for the tests of `autoencoders`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from autoencoders.architecture import TamingConfig
from autoencoders.taming import TamingAutoencoder


def config(**changes: Any) -> TamingConfig:
    """10 x 10 pictures centred on a canvas of 12, folded by 3: latents (2, 4, 4)."""
    base = {
        "image_shape": (1, 10, 10), "canvas": 12, "patch": 3, "ch": 32, "ch_mult": (1,),
        "z_channels": 3, "embed_dim": 2, "n_embed": 8,
    }  # fmt: skip
    return TamingConfig(**base | changes)


def model(seed: int = 0, **changes: Any) -> TamingAutoencoder:
    """Random weights; a codebook as wide as the latents."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        autoencoder = TamingAutoencoder(config(**changes))
        if autoencoder.config.flavour == "vq":
            autoencoder.quantize.embedding.weight.data.normal_()
    return autoencoder


def x_of(n: int, seed: int = 0, shape: tuple[int, ...] = (1, 10, 10)) -> torch.Tensor:
    """Images in [-1, 1]."""
    return torch.rand((n, *shape), generator=torch.Generator().manual_seed(seed)) * 2 - 1


def blobs(n: int, seed: int = 0, side: int = 10) -> torch.Tensor:
    """Pictures that a small network can learn: one bright blob each; uint8 (n, 1, side, side)."""
    rng = np.random.default_rng(seed)
    centre = rng.uniform(2, side - 2, (n, 2, 1, 1))
    y, x = np.mgrid[:side, :side]
    squared = (y - centre[:, 0]) ** 2 + (x - centre[:, 1]) ** 2
    return torch.from_numpy((255 * np.exp(-squared / 6)).astype(np.uint8))[:, None]
