"""Draws of the latents of a large cache, computed when they are read instead of stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.data.latent_cache import LatentCache
from pipeline.runtime.rng import normals
from pipeline.storage.shards.manifest import content_key
from pipeline.storage.shards.reader import StoreReader

#: samples from which draws are not stored; those of 2²⁰ latents (4, 32, 32) take 17 GB
MANY = 1 << 20


class DrawnLatents(StoreReader):
    """Samples of stage 0 without a copy of the cache.

    Sample i is draw i // n of latent i mod n,

        z_i = μ + σ ε_i,   ε_i ~ N(0, I),

    with the moments of the cache, in standardised units. The noise depends on i alone.

    Args:
        cache: of n latents.
        draws: of every latent.
        noise: standard deviation of the noise on latents without a posterior.
        identity: everything that decides the samples.
    """

    def __init__(
        self, cache: LatentCache, draws: int, noise: float, identity: dict[str, Any]
    ) -> None:
        shards = cache.reader.manifest["shards"]
        key, count = content_key(identity), len(cache) * draws
        manifest = {"key": key, "identity": identity, "count": count, "shards": shards}
        super().__init__(cache.reader.folder, manifest)
        self.cache, self.noise = cache, noise

    def take(self, name: str, indices: Tensor) -> Tensor:
        """Return z, mean, std or labels (m, …) of the samples at indices (m,) in any order."""
        rows = indices % len(self.cache)
        if name == "labels":
            return self.cache.reader.take(name, rows)
        if name == "std":
            return self.cache.std(rows, self.noise)
        mean = self.cache.mean(rows)
        if name == "mean" or not (self.cache.stochastic or self.noise > 0):
            return mean
        return mean + self.cache.std(rows, self.noise) * normals(indices, self.cache.shape, "draw")

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return the samples [start, stop) of a field, (n, …)."""
        return self.take(name, torch.arange(start, stop))
