"""Pixel space: the autoencoder that does nothing, for flows trained on the images themselves."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from autoencoders.base import Moments, check_images, check_latents, module_fingerprint


class IdentityAutoencoder(nn.Module):
    """Latents are the images themselves, in [-1, 1].

    Args:
        image_shape: (C, H, W).
    """

    stochastic = False

    def __init__(self, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.image_shape = image_shape
        self.latent_shape = image_shape
        self.fingerprint = module_fingerprint(self.describe(), self)

    def encode(self, x: Tensor) -> Moments:
        """The images, unchanged: z = x."""
        check_images(x, self.image_shape)
        return Moments(x)

    def decode(self, z: Tensor) -> Tensor:
        """The latents clamped to [-1, 1]."""
        check_latents(z, self.latent_shape)
        return z.clamp(-1.0, 1.0)

    def describe(self) -> dict[str, Any]:
        """Name and image shape."""
        return {"kind": "identity", "image_shape": list(self.image_shape)}
