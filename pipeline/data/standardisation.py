"""Standardisation of latents by the mean and std of each channel, and counts of classes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.storage.shards.reader import StoreReader


@dataclass(frozen=True)
class Standardisation:
    """Affine map of latents (or points) to the flow's data space, with mean and std (C_z,)."""

    mean: Tensor
    std: Tensor

    def apply(self, latents: Tensor) -> Tensor:
        """Standardise latents (B, C_z, H_z, W_z) or vectors (B, D)."""
        return (latents - self._broadcast(self.mean, latents)) / self._broadcast(self.std, latents)

    def scale(self, std: Tensor) -> Tensor:
        """Scale standard deviations of latents (B, C_z, H_z, W_z) as `apply` scales latents."""
        return std / self._broadcast(self.std, std)

    def undo(self, z: Tensor) -> Tensor:
        """Invert `apply` on z, (B, C_z, H_z, W_z) or (B, D)."""
        return z * self._broadcast(self.std, z) + self._broadcast(self.mean, z)

    def is_close(self, other: Standardisation) -> bool:
        """Return whether another standardisation is equal up to rounding."""
        return self.mean.shape == other.mean.shape and all(
            torch.allclose(a, b, rtol=1e-3, atol=1e-3)
            for a, b in ((self.mean, other.mean), (self.std, other.std))
        )

    def to_dict(self) -> dict[str, list[float]]:
        """Return a JSON-ready dictionary."""
        return {"mean": self.mean.tolist(), "std": self.std.tolist()}

    @classmethod
    def from_dict(cls, values: dict[str, list[float]]) -> Standardisation:
        """Invert `to_dict`.

        Raises:
            KeyError: mean or std is missing.
            ValueError: the values are not a finite mean and a positive std of each channel.
        """
        try:
            mean, std = (torch.tensor(values[name], dtype=torch.float) for name in ("mean", "std"))
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ValueError(f"mean and std are not lists of numbers ({error})") from error
        whole = bool(torch.isfinite(torch.cat([mean.flatten(), std.flatten()])).all())
        if mean.ndim != 1 or mean.shape != std.shape or not whole or not bool((std > 0).all()):
            raise ValueError("mean and std are not finite, of one length, with a positive std")
        return cls(mean, std)

    @staticmethod
    def _broadcast(values: Tensor, like: Tensor) -> Tensor:
        """Reshape values (C_z,) to (1, C_z, 1, …) as `like` (B, C_z, …) needs."""
        return values.to(like).view(1, -1, *[1] * (like.ndim - 2))


def standardisation_of(store: StoreReader) -> Standardisation:
    """Compute mean and std of each channel in float64: Var[z] = Var[mean] + E[exp(log_var)].

    The store has the fields `mean` (n, C_z, …), and `log_var` of the same shape or none.
    """
    count, total, square = 0, torch.zeros(()).double(), torch.zeros(()).double()
    for index in range(len(store.manifest["shards"])):
        shard = store.shard(index)
        mean = shard["mean"].double()
        dims = (0, *range(2, mean.ndim))
        spread = shard["log_var"].double().exp() if "log_var" in shard else 0.0
        count += mean[:, 0].numel()
        total = total + mean.sum(dims)
        square = square + (mean**2 + spread).sum(dims)
    average = total / count
    std = (square / count - average**2).clamp(min=1e-12).sqrt()
    return Standardisation(average.float(), std.clamp(min=1e-6).float())


def class_counts(reader: StoreReader) -> dict[int, int]:
    """Count the samples of every class, shard by shard."""
    counts: Counter[int] = Counter()
    for index in range(len(reader.manifest["shards"])):
        labels, numbers = reader.shard(index)["labels"].unique(return_counts=True)
        counts.update(dict(zip(labels.tolist(), numbers.tolist(), strict=True)))
    return dict(sorted(counts.items()))


def facts(reader: StoreReader) -> dict[str, Any]:
    """Return the entries of a cache's manifest that follow from its shards."""
    return {
        "standardisation": standardisation_of(reader).to_dict(),
        "classes": list(class_counts(reader).items()),
    }
