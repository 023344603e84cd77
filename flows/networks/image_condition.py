"""A field told an image besides its samples: v(t, z | c), c of the samples' own grid.

The network is one of the kinds for grids, on samples of C + K channels: it sees z and c side by
side, and of what it gives the first C channels count. Solvers know v(t, z) alone, so for one pass
c is bound to the field (`flows.networks.condition`), as labels are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flows.errors import FlowError
from flows.networks.base import Piece, Velocity, given


class Beside(Velocity):
    """A velocity that needs an image (K, H, W) beside every sample.

    Args:
        inner: on (C + K, H, W).
        channels: K, of the image; at least 1 and fewer than the inner velocity's.

    Raises:
        FlowError: K out of range, or an inner velocity that jumps.
    """

    def __init__(self, inner: Velocity, channels: int) -> None:
        if not 0 < channels < inner.shape[0]:
            raise FlowError(
                f"velocity.beside = {channels} must lie between 1 and {inner.shape[0] - 1} for a "
                f"network on {inner.shape[0]} channels"
            )
        if len(inner.pieces()) > 1:
            raise FlowError("velocity.beside takes one network a block (velocity.nets=1)")
        super().__init__((inner.shape[0] - channels, *inner.shape[1:]), inner.classes)
        self.inner, self.channels = inner, channels

    def forward(self, t: Tensor, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """See :class:`Velocity`; there is no field without the image."""
        raise FlowError("this velocity is told an image beside every sample (Condition.beside)")

    def told(self, beside: Tensor) -> Velocity:
        """The field of samples whose images are known; shares the weights.

        Args:
            beside: (B, K, H, W).

        Raises:
            FlowError: another shape.
        """
        wanted = (self.channels, *self.shape[1:])
        if tuple(beside.shape[1:]) != wanted:
            raise FlowError(
                f"expected an image of shape {wanted} beside every sample, found "
                f"{tuple(beside.shape[1:])}"
            )
        return Told(self.inner, beside)


class Told(Velocity):
    """A field v(t, z) of B samples, each with the image beside it bound.

    Args:
        inner: on samples and images side by side.
        beside: (B, K, H, W).
    """

    def __init__(self, inner: Velocity, beside: Tensor) -> None:
        shape = (inner.shape[0] - beside.shape[1], *inner.shape[1:])
        super().__init__(shape, inner.classes)
        self.inner, self.beside = inner, beside

    def forward(self, t: Tensor, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """See :class:`Velocity`; z may hold the B samples several times, one after another."""
        beside = self.beside.to(z.dtype).repeat(len(z) // len(self.beside), 1, 1, 1)
        return self.inner(t, torch.cat([z, beside], 1), *given(labels))[:, : self.shape[0]]

    def pieces(self) -> tuple[Piece, ...]:
        """See :class:`Velocity`; one, for the inner velocity never jumps."""
        return super().pieces()
