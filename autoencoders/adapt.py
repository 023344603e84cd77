"""Adaptation of an autoencoder to images of another size or channel count, or to other latents.

Encoding replicates the channel of grey images if the encoder takes more, and resizes images to its
size (bilinear, antialiased). Decoding reverts both; their error counts in the reconstruction
floor.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from autoencoders.base import Autoencoder, Moments, check_images, check_latents

FITS = ("exact", "native", "resize")
LATENTS = ("pre", "quantised")


@dataclass(frozen=True)
class Adaptation:
    """Settings that fit an autoencoder to a data set; the defaults change nothing.

    Attributes:
        fit: "exact" takes only images of the shape of the weights. "native" encodes images at
            their own size (the networks are convolutional). "resize" resizes them to `size`. The
            last two replicate a grey channel if the encoder takes more.
        size: side of the square images at the encoder ("resize"); 0 takes the size of the weights.
        latents: "pre", the latents before quantisation, which decoding quantises; or "quantised",
            the codebook entries, which decoding rounds to the nearest entry.
    """

    fit: str = "exact"
    size: int = 0
    latents: str = "pre"

    def __post_init__(self) -> None:
        if self.fit not in FITS:
            raise ValueError(f"fit is {self.fit!r}; expected one of {', '.join(FITS)}")
        if self.latents not in LATENTS:
            raise ValueError(f"latents is {self.latents!r}; expected one of {', '.join(LATENTS)}")
        if self.size < 0 or (self.size and self.fit != "resize"):
            raise ValueError(
                f"size is {self.size} and fit {self.fit!r}; expected size ≥ 0, and fit=resize for "
                "a size above 0"
            )


class AdaptedAutoencoder(nn.Module):
    """Autoencoder with a change of image size, image channels, or kind of latents.

    The images (C, H, W) of the data have the channels of `inner`, or 1.

    Raises:
        ValueError: the channels cannot be replicated, or there is no codebook to quantise.
    """

    def __init__(
        self, inner: Autoencoder, image_shape: tuple[int, int, int], latents: str = "pre"
    ) -> None:
        super().__init__()
        if image_shape[0] not in (1, inner.image_shape[0]):
            raise ValueError(
                f"the images have {image_shape[0]} channels; expected {inner.image_shape[0]}, or "
                "1 to replicate; choose another autoencoder"
            )
        self.codebook_size: int = getattr(inner, "codebook_size", 0)
        if latents == "quantised" and not self.codebook_size:
            raise ValueError(
                "latents is 'quantised', but this autoencoder has no codebook; use latents=pre"
            )
        self.inner: Any = inner
        self.image_shape = image_shape
        self.latent_shape = inner.latent_shape
        self.stochastic = inner.stochastic
        self.latents = latents
        shape = "x".join(map(str, image_shape))
        seed = f"{inner.fingerprint} adapted to {shape}, latents {latents}"
        self.fingerprint = hashlib.sha256(seed.encode()).hexdigest()

    def encode(self, x: Tensor) -> Moments:
        """Encode images (B, C, H, W) of the data to the moments of their latents."""
        check_images(x, self.image_shape)
        moments = self.inner.encode(self._fit(x))
        return Moments(self.inner.quantise(moments.mean)[0]) if self._quantised else moments

    def decode(self, z: Tensor) -> Tensor:
        """Decode latents (B, C_z, H_z, W_z) to images (B, C, H, W) of the data, in [-1, 1]."""
        check_latents(z, self.latent_shape)
        if self._quantised:
            x = self.inner.decode_entries(self.inner.nearest(z))
        else:
            x = self.inner.decode(z)
        if self.image_shape[0] != x.shape[1]:
            x = x.mean(1, keepdim=True)
        return _resized(x, self.image_shape[1:]).clamp(-1.0, 1.0)

    def quantise(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantise latents (B, C_z, H_z, W_z), as the inner autoencoder does."""
        return self.inner.quantise(z)

    def codes(self, z: Tensor) -> Tensor:
        """Return the indices (B·H_z·W_z,) of the codebook entries that decoding uses."""
        return self.inner.codes(z, entries=self._quantised)

    def describe(self) -> dict[str, Any]:
        """Describe the adaptation and the inner autoencoder."""
        return {
            "kind": "adapted",
            "image_shape": list(self.image_shape),
            "latents": self.latents,
            "inner": self.inner.describe(),
        }

    @property
    def _quantised(self) -> bool:
        return self.latents == "quantised"

    def _fit(self, x: Tensor) -> Tensor:
        """Resize images and replicate grey channels, for the encoder."""
        channels, *size = self.inner.image_shape
        x = _resized(x, tuple(size))
        return x.expand(-1, channels, -1, -1) if x.shape[1] != channels else x


def adapt(
    autoencoder: Autoencoder, image_shape: tuple[int, int, int], adaptation: Adaptation
) -> Autoencoder:
    """Fit an autoencoder to images of a shape (C, H, W) by the changes that are allowed.

    Nothing changes if nothing has to.

    Raises:
        ValueError: the shapes differ and fit is "exact", or see `AdaptedAutoencoder`.
    """
    own = autoencoder.image_shape
    if adaptation.fit == "exact" and own != image_shape:
        raise ValueError(
            f"the images of the data set have the shape {image_shape}; expected {own}, as "
            "the autoencoder takes; choose another of the two, or set autoencoder.fit=resize or "
            "native"
        )
    encoded = own
    if adaptation.fit == "native":
        encoded = (own[0], *image_shape[1:])
    elif adaptation.size:
        encoded = (own[0], adaptation.size, adaptation.size)
    if encoded != own:
        if not hasattr(autoencoder, "reshaped"):
            raise ValueError(
                f"the size of {type(autoencoder).__name__} is fixed; expected an autoencoder for "
                f"images of shape {encoded}"
            )
        autoencoder = autoencoder.reshaped(encoded)
    if encoded == image_shape and adaptation.latents == "pre":
        return autoencoder
    return AdaptedAutoencoder(autoencoder, image_shape, adaptation.latents)


def _resized(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """Resize images (B, C, H, W) to a size (H, W), bilinear and antialiased."""
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=True)
