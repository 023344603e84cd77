"""Quality of reconstructions: PSNR, SSIM, codebook use and statistics of the latents."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_WINDOW, _SIGMA = 11, 1.5


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Compute 10 log₁₀(255² / MSE) in dB, float64 (B,), of uint8 pairs (B, C, H, W).

    It is infinite for equal images.
    """
    mse = ((a.cpu().double() - b.cpu().double()) ** 2).flatten(1).mean(1)
    return 10.0 * torch.log10(255.0**2 / mse)


def has_ssim(images: Tensor) -> bool:
    """Return whether images (B, C, H, W) are large enough for the window of `ssim`.

    A smaller window would define another measure, so smaller images have no SSIM.
    """
    return min(images.shape[-2:]) >= _WINDOW


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Compute the structural similarity, float64 (B,) in [-1, 1], of uint8 pairs (B, C, H, W).

    The Gaussian window is 11 x 11 with σ = 1.5; K1 = 0.01, K2 = 0.03; there is no padding.

    Raises:
        ValueError: the images are smaller than the window.

    Reference: Wang et al. 2004.
    """
    if not has_ssim(a):
        raise ValueError(
            f"the images are {a.shape[-2]}x{a.shape[-1]}; expected at least {_WINDOW}x{_WINDOW} "
            "for SSIM"
        )
    x, y = a.cpu().double(), b.cpu().double()
    offsets = torch.arange(_WINDOW, dtype=torch.float64) - _WINDOW // 2
    line = torch.exp(-(offsets**2) / (2 * _SIGMA**2))
    window = torch.outer(line, line)
    window = (window / window.sum()).expand(x.shape[1], 1, -1, -1)

    def blur(image: Tensor) -> Tensor:
        return F.conv2d(image, window, groups=x.shape[1])

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    cov = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    value = (2 * mean_x * mean_y + c1) * (2 * cov + c2)
    value = value / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return value.flatten(1).mean(1)


def perplexity(counts: Tensor) -> float:
    """Compute exp(−Σ p log p) of a codebook from the counts (n_embed,) of its entries.

    It reaches n_embed if all entries are used equally.
    """
    p = counts.cpu().double()
    p = p / p.sum()
    p = p[p > 0]
    return math.exp(-float((p * p.log()).sum()))


class Reconstruction:
    """Accumulator of reconstruction measures over batches."""

    def __init__(self) -> None:
        self.psnr: list[Tensor] = []
        self.ssim: list[Tensor] = []
        self.latents: list[Tensor] = []
        self.codes: list[Tensor] = []

    def add(
        self, images: Tensor, reconstructions: Tensor, latents: Tensor, codes: Tensor | None
    ) -> None:
        """Add a batch: uint8 images and reconstructions (B, C, H, W), latents (B, C_z, H_z, W_z).

        `codes` are indices of codebook entries, of any shape; None without a codebook.
        """
        self.psnr.append(psnr(images, reconstructions))
        if has_ssim(images):
            self.ssim.append(ssim(images, reconstructions))
        self.latents.append(latents.float().cpu())
        if codes is not None:
            self.codes.append(codes.flatten())

    def result(self, entries: int) -> dict[str, Any]:
        """Average over all batches, as JSON values; `entries` is the size of the codebook.

        Exact reconstructions have an infinite PSNR. They are counted as `exact`, and `psnr` is the
        mean of the others, or None without others. `ssim` is None for images smaller than its
        window.
        """
        signal, z = torch.cat(self.psnr), torch.cat(self.latents).double()
        finite = signal[torch.isfinite(signal)]
        result: dict[str, Any] = {
            "n": len(signal),
            "exact": len(signal) - len(finite),
            "psnr": float(finite.mean()) if len(finite) else None,
            "ssim": float(torch.cat(self.ssim).mean()) if self.ssim else None,
            "latents": {
                "shape": list(z.shape[1:]),
                "mean": z.mean((0, 2, 3)).tolist(),
                "std": z.std((0, 2, 3)).tolist(),
                "largest": float(z.abs().max()),
            },
        }
        if self.codes:
            counts = torch.bincount(torch.cat(self.codes), minlength=entries)
            result["codebook"] = {
                "entries": entries,
                "used": int((counts > 0).sum()),
                "perplexity": perplexity(counts),
            }
        return result
