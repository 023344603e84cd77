"""Images of another size or channel count than an encoder wants, and latents of another kind.

An adapted autoencoder takes the data's images x (B, C, H, W): it replicates a grey image's channel
where the encoder wants more, resizes (bilinear, antialiased) to the encoder's size, and decoding
undoes both: resized back, and grey is the mean of the decoded channels. What is lost on the
way counts in the reconstruction floor, as everything that the autoencoder loses does.
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
    """How an autoencoder is fitted to a data set; the defaults change nothing.

    Attributes:
        fit: "exact" refuses images of another shape than the weights are for; "native" encodes
            them at their own size (the networks are convolutional); "resize" resizes them to
            `size`. Both replicate a grey channel where the encoder wants more.
        size: side of the square that the encoder sees ("resize"); 0 takes the weights' own.
        latents: "pre", the latents before quantisation, which decoding quantises; or
            "quantised", the codebook entries, which decoding snaps to the nearest entry.
    """

    fit: str = "exact"
    size: int = 0
    latents: str = "pre"

    def __post_init__(self) -> None:
        if self.fit not in FITS:
            raise ValueError(f"fit must be one of {', '.join(FITS)}, not {self.fit!r}")
        if self.latents not in LATENTS:
            raise ValueError(f"latents must be one of {', '.join(LATENTS)}, not {self.latents!r}")
        if self.size < 0 or (self.size and self.fit != "resize"):
            raise ValueError(f"size ({self.size}) goes with fit=resize, and is not negative")


class AdaptedAutoencoder(nn.Module):
    """An autoencoder behind a change of size, channels, or kind of latents.

    Args:
        inner: takes images of its own shape; has a codebook where latents are quantised.
        image_shape: (C, H, W) of the data; C is the inner one's, or 1.
        latents: see `Adaptation`.

    Raises:
        ValueError: channels that cannot be replicated, or no codebook.
    """

    def __init__(
        self, inner: Autoencoder, image_shape: tuple[int, int, int], latents: str = "pre"
    ) -> None:
        super().__init__()
        wanted, given = inner.image_shape[0], image_shape[0]
        if given not in (1, wanted):
            raise ValueError(
                f"the images have {given} channels and the autoencoder takes {wanted}; only grey "
                "images can be replicated, choose another autoencoder"
            )
        self.codebook_size: int = getattr(inner, "codebook_size", 0)
        if latents == "quantised" and not self.codebook_size:
            raise ValueError("this autoencoder has no codebook; use latents=pre")
        self.inner: Any = inner
        self.image_shape = image_shape
        self.latent_shape = inner.latent_shape
        self.stochastic = inner.stochastic
        self.latents = latents
        shape = "x".join(map(str, image_shape))
        seed = f"{inner.fingerprint} adapted to {shape}, latents {latents}"
        self.fingerprint = hashlib.sha256(seed.encode()).hexdigest()

    def encode(self, x: Tensor) -> Moments:
        """Images (B, C, H, W) of the data to the moments of their latents."""
        check_images(x, self.image_shape)
        moments = self.inner.encode(self._fit(x))
        return Moments(self.inner.quantise(moments.mean)[0]) if self._quantised else moments

    def decode(self, z: Tensor) -> Tensor:
        """Latents to images (B, C, H, W) of the data's shape, clamped to [-1, 1]."""
        check_latents(z, self.latent_shape)
        if self._quantised:
            x = self.inner.decode_entries(self.inner.nearest(z))
        else:
            x = self.inner.decode(z)
        if self.image_shape[0] != x.shape[1]:
            x = x.mean(1, keepdim=True)
        return _resized(x, self.image_shape[1:]).clamp(-1.0, 1.0)

    def quantise(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codebook entries, loss and indices of latents (see the inner one's)."""
        return self.inner.quantise(z)

    def codes(self, z: Tensor) -> Tensor:
        """Numbers (B·H_z·W_z,) of the codebook entries that latents are decoded from."""
        return self.inner.codes(z, entries=self._quantised)

    def describe(self) -> dict[str, Any]:
        """What it does to the images, and the inner autoencoder's description."""
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
        channels, *size = self.inner.image_shape
        x = _resized(x, tuple(size))
        return x.expand(-1, channels, -1, -1) if x.shape[1] != channels else x


def adapt(
    autoencoder: Autoencoder, image_shape: tuple[int, int, int], adaptation: Adaptation
) -> Autoencoder:
    """Fit an autoencoder to images of a shape; the same one where nothing is to be done.

    Args:
        autoencoder: as its weights are stored.
        image_shape: (C, H, W) of the data.
        adaptation: what may be done.

    Raises:
        ValueError: another shape and fit is "exact", or what `AdaptedAutoencoder` refuses.
    """
    own = tuple(autoencoder.image_shape)
    if adaptation.fit == "exact" and own != tuple(image_shape):
        raise ValueError(
            f"the autoencoder takes images of shape {own}, but the data set has "
            f"{tuple(image_shape)}; choose another of the two, or let the images be fitted "
            "(autoencoder.fit=resize or native)"
        )
    wanted: tuple[int, ...] = own
    if adaptation.fit == "native":
        wanted = (own[0], *image_shape[1:])
    elif adaptation.size:
        wanted = (own[0], adaptation.size, adaptation.size)
    if wanted != own:
        if not hasattr(autoencoder, "reshaped"):
            raise ValueError(f"{type(autoencoder).__name__} cannot take images of another size")
        autoencoder = autoencoder.reshaped(wanted)
    if wanted == tuple(image_shape) and adaptation.latents == "pre":
        return autoencoder
    return AdaptedAutoencoder(autoencoder, image_shape, adaptation.latents)


def _resized(x: Tensor, size: tuple[int, ...]) -> Tensor:
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=True)
