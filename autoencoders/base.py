"""The protocol that every autoencoder meets, and what they share.

An autoencoder maps images x (B, C, H, W), float32 in [-1, 1], to latents and back. Encoding
gives *moments*: a mean, and for a KL autoencoder the log-variance of its Gaussian posterior.
Latents are pre-quantised: `decode` quantises where the model has a codebook.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Moments:
    """What encoding an image gives.

    Attributes:
        mean: (B, C_z, H_z, W_z), the latent, or the mean of its posterior.
        log_var: same shape, log-variance of the posterior; None for a deterministic encoder.
    """

    mean: Tensor
    log_var: Tensor | None = None

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw z = mean + exp(log_var / 2) * noise; the mean itself where there is no variance."""
        if self.log_var is None:
            return self.mean
        noise = torch.randn(self.mean.shape, generator=generator, dtype=self.mean.dtype)
        return self.mean + (0.5 * self.log_var).exp() * noise.to(self.mean.device)


@runtime_checkable
class Autoencoder(Protocol):
    """Images to latents and back; every implementation is an `nn.Module` in eval mode.

    Attributes:
        image_shape: (C, H, W) of the images it takes and gives.
        latent_shape: (C_z, H_z, W_z) of its latents.
        stochastic: whether encoding gives a log-variance.
        fingerprint: hex digest of the architecture and the weights: two autoencoders with
            the same fingerprint give the same latents.
    """

    image_shape: tuple[int, int, int]
    latent_shape: tuple[int, int, int]
    stochastic: bool
    fingerprint: str

    def encode(self, x: Tensor) -> Moments:
        """Images (B, C, H, W) in [-1, 1] to moments of latents."""

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, C_z, H_z, W_z) to images (B, C, H, W), clamped to [-1, 1]."""

    def describe(self) -> dict[str, Any]:
        """Architecture as JSON-ready values, for manifests and cards."""


def to_float(images: Tensor) -> Tensor:
    """uint8 images (B, C, H, W) to float32 in [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1.0


def to_uint8(x: Tensor) -> Tensor:
    """Float images in [-1, 1] to uint8, rounded to nearest and clamped."""
    return ((x.float() + 1.0) * 127.5).round_().clamp_(0, 255).to(torch.uint8)


def module_fingerprint(description: dict[str, Any], module: nn.Module) -> str:
    """Hex sha256 over a description and every tensor of a module, by name, shape and bytes."""
    digest = hashlib.sha256(repr(sorted(description.items())).encode())
    for name, tensor in sorted(module.state_dict().items()):
        array = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {array.dtype} {tuple(array.shape)}".encode())
        digest.update(array.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_images(x: Tensor, image_shape: tuple[int, int, int]) -> None:
    """Refuse images of another shape than the autoencoder takes.

    Raises:
        ValueError: names the expected and the found shape.
    """
    if x.ndim != 4 or tuple(x.shape[1:]) != image_shape:
        raise ValueError(
            f"this autoencoder takes images of shape (B, {', '.join(map(str, image_shape))}), "
            f"not {tuple(x.shape)}; choose an autoencoder trained on such images"
        )


def check_latents(z: Tensor, latent_shape: tuple[int, int, int]) -> None:
    """Refuse latents of another shape than the autoencoder decodes.

    Raises:
        ValueError: names the expected and the found shape.
    """
    if z.ndim != 4 or tuple(z.shape[1:]) != latent_shape:
        raise ValueError(
            f"this autoencoder decodes latents of shape (B, {', '.join(map(str, latent_shape))}), "
            f"not {tuple(z.shape)}; use the autoencoder that made them"
        )
