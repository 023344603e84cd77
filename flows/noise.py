"""Random tensors drawn on the device of their generator, then moved to that of the samples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def draw_gaussian(
    shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Draw independent N(0, 1) values of a shape (…), with the device and dtype of ``like``.

    The generator may be on another device; None is PyTorch's global generator.
    """
    device = like.device if generator is None else generator.device
    noise = torch.randn(shape, generator=generator, device=device, dtype=like.dtype)
    return noise.to(like.device)


def draw_rademacher(
    shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Draw independent values −1 or 1 of a shape (…), as :func:`draw_gaussian` does."""
    device = like.device if generator is None else generator.device
    coin = torch.randint(2, shape, generator=generator, device=device)
    return coin.to(like.dtype).mul_(2).sub_(1).to(like.device)


@contextmanager
def initial_weights(generator: torch.Generator | None) -> Iterator[None]:
    """Let PyTorch's initialisers draw from a generator, within a ``with`` statement.

    They draw from the global generator, so that is seeded here and restored afterwards. None
    leaves it as it is.
    """
    if generator is None:
        yield
        return
    seed = torch.randint(2**62, (), generator=generator, device=generator.device)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(seed))
        yield
