"""Per-channel standardisation of latents."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Standardisation:
    """The affine map between latents (or points) and what the flow sees, channel by channel.

    Attributes:
        mean: (C_z,).
        std: (C_z,), positive.
    """

    mean: Tensor
    std: Tensor

    def apply(self, latents: Tensor) -> Tensor:
        """Latents (B, C_z, H_z, W_z), or vectors (B, D), to zero mean and unit variance."""
        return (latents - self._wide(self.mean, latents)) / self._wide(self.std, latents)

    def undo(self, z: Tensor) -> Tensor:
        """The inverse of `apply`."""
        return z * self._wide(self.std, z) + self._wide(self.mean, z)

    def agrees(self, other: Standardisation) -> bool:
        """Whether another is the same but for rounding: that of the same latents."""
        return self.mean.shape == other.mean.shape and all(
            torch.allclose(a, b, rtol=1e-3, atol=1e-3)
            for a, b in ((self.mean, other.mean), (self.std, other.std))
        )

    def to_dict(self) -> dict[str, list[float]]:
        """JSON-ready."""
        return {"mean": self.mean.tolist(), "std": self.std.tolist()}

    @classmethod
    def from_dict(cls, values: dict[str, list[float]]) -> Standardisation:
        """From what `to_dict` gave."""
        return cls(torch.tensor(values["mean"]), torch.tensor(values["std"]))

    @staticmethod
    def _wide(values: Tensor, like: Tensor) -> Tensor:
        return values.to(like).view(1, -1, *[1] * (like.ndim - 2))
