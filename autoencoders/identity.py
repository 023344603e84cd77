"""Identity autoencoder, for flows in pixel space."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from autoencoders.base import Moments, check_images, check_latents, module_fingerprint


class IdentityAutoencoder(nn.Module):
    """Autoencoder whose latents are the images (C, H, W), in [-1, 1]."""

    stochastic = False

    def __init__(self, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.image_shape = image_shape
        self.latent_shape = image_shape
        self.fingerprint = module_fingerprint(self.describe(), self)

    def encode(self, x: Tensor) -> Moments:
        """Return images x (B, C, H, W) as latents, z = x."""
        check_images(x, self.image_shape)
        return Moments(x)

    def decode(self, z: Tensor) -> Tensor:
        """Clamp latents (B, C, H, W) to [-1, 1]."""
        check_latents(z, self.latent_shape)
        return z.clamp(-1.0, 1.0)

    def describe(self) -> dict[str, Any]:
        """Describe kind and image shape."""
        return {"kind": "identity", "image_shape": list(self.image_shape)}
