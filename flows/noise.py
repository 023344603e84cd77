"""Random tensors drawn on the device of their generator, then moved to that of the samples."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_gaussian(
    shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Draw independent N(0, 1) values of the given shape (…).

    Args:
        shape: shape of the result.
        like: tensor whose device and dtype the result has.
        generator: source, which may be on another device; None uses PyTorch's global generator.
    """
    device = like.device if generator is None else generator.device
    noise = torch.randn(shape, generator=generator, device=device, dtype=like.dtype)
    return noise.to(like.device)


def draw_rademacher(
    shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Draw independent values −1 or 1 with equal probability, of the given shape (…).

    The arguments are those of :func:`draw_gaussian`.
    """
    device = like.device if generator is None else generator.device
    coin = torch.randint(2, shape, generator=generator, device=device)
    return coin.to(like.dtype).mul_(2).sub_(1).to(like.device)
