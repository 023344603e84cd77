"""Protocol of all autoencoders, and their common functions.

Encoding returns *moments*: a mean, and for a KL autoencoder the log-variance of its posterior.
Latents are those before quantisation: `decode` quantises if the model has a codebook.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Moments:
    """Mean of the latents (B, C_z, H_z, W_z), and log-variance if they have a posterior."""

    mean: Tensor
    log_var: Tensor | None = None

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Sample z = mean + exp(log_var / 2) * noise, (B, C_z, H_z, W_z); without it the mean."""
        if self.log_var is None:
            return self.mean
        noise = torch.randn(self.mean.shape, generator=generator, dtype=self.mean.dtype)
        return self.mean + (0.5 * self.log_var).exp() * noise.to(self.mean.device)


@runtime_checkable
class Autoencoder(Protocol):
    """Protocol of an autoencoder; every implementation is an `nn.Module` in eval mode.

    Attributes:
        image_shape: (C, H, W) of the images.
        latent_shape: (C_z, H_z, W_z) of the latents.
        stochastic: whether the moments have a log-variance.
        fingerprint: hex digest of architecture and weights; equal ones encode to the same latents.
    """

    image_shape: tuple[int, int, int]
    latent_shape: tuple[int, int, int]
    stochastic: bool
    fingerprint: str

    def encode(self, x: Tensor) -> Moments:
        """Encode images (B, C, H, W) in [-1, 1] to moments of latents."""

    def decode(self, z: Tensor) -> Tensor:
        """Decode latents (B, C_z, H_z, W_z) to images (B, C, H, W), clamped to [-1, 1]."""

    def describe(self) -> dict[str, Any]:
        """Describe the architecture as JSON values, for manifests and cards."""


def to_float(images: Tensor) -> Tensor:
    """Convert uint8 images (B, C, H, W) to float32 in [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1.0


def to_uint8(x: Tensor) -> Tensor:
    """Convert float images (B, C, H, W) in [-1, 1] to uint8, rounded to nearest and clamped."""
    return ((x.float() + 1.0) * 127.5).round_().clamp_(0, 255).to(torch.uint8)


def module_fingerprint(description: dict[str, Any], module: nn.Module) -> str:
    """Hash a description and every tensor of a module by name, dtype, shape and bytes (sha256)."""
    digest = hashlib.sha256(repr(sorted(description.items())).encode())
    for name, tensor in sorted(module.state_dict().items()):
        array = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {array.dtype} {tuple(array.shape)}".encode())
        digest.update(array.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_images(x: Tensor, image_shape: tuple[int, int, int]) -> None:
    """Raise ValueError unless images x are (B, *image_shape)."""
    _check(x, image_shape, "images", "choose an autoencoder for such images")


def check_latents(z: Tensor, latent_shape: tuple[int, int, int]) -> None:
    """Raise ValueError unless latents z are (B, *latent_shape)."""
    _check(z, latent_shape, "latents", "use the autoencoder that encoded them")


def _check(x: Tensor, shape: tuple[int, int, int], what: str, advice: str) -> None:
    if x.ndim != 4 or tuple(x.shape[1:]) != shape:
        raise ValueError(
            f"the {what} have the shape {tuple(x.shape)}; expected "
            f"(B, {', '.join(map(str, shape))}); {advice}"
        )
