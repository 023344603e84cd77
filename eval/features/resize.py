"""Resizing of images to the input of the FID network, as three implementations of FID do it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

SIDE = 299
"""Height and width of the network's input."""


def _pytorch(images: Tensor) -> Tensor:
    """Resize bilinearly without antialiasing, half-pixel centres; scale by x / 127.5 - 1."""
    x = images.float() / 255
    x = F.interpolate(x, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    return 2 * x - 1


def _clean(images: Tensor) -> Tensor:
    """Resize bicubically with antialiasing by Pillow, in float32; scale by (x - 128) / 128."""
    planes = images.cpu().flatten(0, 1).float().numpy()
    size = (SIDE, SIDE)
    resized = [
        np.asarray(Image.fromarray(plane).resize(size, Image.Resampling.BICUBIC))
        for plane in planes
    ]
    x = torch.from_numpy(np.stack(resized)).clamp_(0, 255).to(images.device)
    return (x.view(*images.shape[:2], SIDE, SIDE) - 128) / 128


def _tensorflow(images: Tensor) -> Tensor:
    """Resize as TensorFlow 1: bilinear, pixel i at i · side / 299; scale by (x - 128) / 128."""
    x = images.float()
    for axis in (2, 3):
        side = x.shape[axis]
        place = torch.arange(SIDE, device=x.device, dtype=torch.float32) * (side / SIDE)
        low = place.floor().long().clamp_(max=side - 1)
        high = (low + 1).clamp_(max=side - 1)
        weight = (place - low).view(-1, *[1] * (3 - axis))
        below, above = x.index_select(axis, low), x.index_select(axis, high)
        x = below + (above - below) * weight
    return (x - 128) / 128


MODES: dict[str, Callable[[Tensor], Tensor]] = {
    "pytorch": _pytorch,
    "clean": _clean,
    "tensorflow": _tensorflow,
}
"""Resizes by name: pytorch-fid's, clean-fid's, and that of the TensorFlow graph (ADM, EDM)."""


def prepare(images: Tensor, mode: str = "pytorch") -> Tensor:
    """Map images uint8 (B, 1 or 3, H, W) to the network's input, float32 (B, 3, 299, 299).

    Grey images are repeated to three channels.

    Reference: pytorch-fid; Parmar et al. 2022 (clean-fid); Heusel et al. 2017 (TensorFlow).
    """
    return MODES[mode](images).expand(-1, 3, -1, -1)
