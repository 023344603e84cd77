"""Unsharp masking of decoded images, as strong as the data asks for.

An autoencoder trained on |x − x̂| decodes the median of the images that share a latent, which is
smoother than any of them. The mask adds that much of the Laplacian back,

    x̂ ← x̂ − a Δx̂,        a such that  mean|Δx̂| = mean|Δx|  over images of the training set,

with the five-point Laplacian Δ and the border repeated. Latents do not depend on it.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

#: strongest mask that is looked for
STRONGEST = 0.5
_HALVINGS = 30


def sharpen(x: Tensor, strength: float) -> Tensor:
    """Add the mask to images (B, C, H, W); 0 leaves them as they are."""
    return x - strength * laplacian(x) if strength else x


def laplacian(x: Tensor) -> Tensor:
    """Sum of the four neighbours less four times the pixel, per channel; border repeated.

    Args:
        x: (B, C, H, W).

    Returns:
        (B, C, H, W).
    """
    p = F.pad(x, (1, 1, 1, 1), mode="replicate")
    around = p[..., :-2, 1:-1] + p[..., 2:, 1:-1] + p[..., 1:-1, :-2] + p[..., 1:-1, 2:]
    return around - 4.0 * x


def calibrate(decoded: Tensor, images: Tensor, limits: tuple[float, float]) -> float:
    """The strength a at which decoded images have as much detail as the images themselves.

    Detail is mean|Δ|; it grows with a until pixels saturate, so a is found by bisection.

    Args:
        decoded: (B, C, H, W), before any mask, clamped to `limits`.
        images: (B, C, H, W), what they were decoded from, in [-1, 1].
        limits: darkest and brightest value.

    Returns:
        a in [0, `STRONGEST`], to three digits; 0 if the decoded images have enough detail already.
    """
    wanted = laplacian(images).abs().mean()

    def lacks(strength: float) -> bool:
        masked = sharpen(decoded, strength).clamp(*limits)
        return bool(laplacian(masked).abs().mean() < wanted)

    low, high = 0.0, STRONGEST
    if not lacks(low):
        return low
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if lacks(middle) else (low, middle)
    return round(high, 3)
