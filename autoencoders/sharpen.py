"""Unsharp masking of decoded images, x̂ ← x̂ − a Δx̂.

An autoencoder trained on |x − x̂| decodes the median of the images that share a latent, which is
smoother than each of them. Latents do not depend on the mask.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def sharpen(x: Tensor, strength: float) -> Tensor:
    """Sharpen images x (B, C, H, W) by the mask of a strength a; 0 returns them unchanged."""
    return x - strength * laplacian(x) if strength else x


def laplacian(x: Tensor) -> Tensor:
    """Compute the sum of the four neighbours minus four times the pixel of images (B, C, H, W).

    The border is repeated.
    """
    p = F.pad(x, (1, 1, 1, 1), mode="replicate")
    neighbours = p[..., :-2, 1:-1] + p[..., 2:, 1:-1] + p[..., 1:-1, :-2] + p[..., 1:-1, 2:]
    return neighbours - 4.0 * x
