"""Velocity fields conditioned on an image: v(t, z | c), c on the grid of the samples.

The network takes samples and images concatenated along the channels, (B, C + K, H, W), and the
first C channels of its output are the field. Images are bound to it for one pass through a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flows.errors import FlowError
from flows.networks.base import Velocity, optional


class ImageConditionedNetwork(Velocity):
    """A network on C + K channels that needs an image (K, H, W) for each sample (C, H, W).

    Raises:
        FlowError: K is out of range, or the inner network jumps in time.
    """

    def __init__(self, inner: Velocity, channels: int) -> None:
        if not 0 < channels < inner.shape[0]:
            raise FlowError(
                f"velocity.image_channels = {channels} must lie between 1 and "
                f"{inner.shape[0] - 1} for a network on {inner.shape[0]} channels"
            )
        if len(inner.smooth_pieces()) > 1:
            raise FlowError("velocity.image_channels needs a single network (velocity.nets=1)")
        super().__init__((inner.shape[0] - channels, *inner.shape[1:]), inner.classes)
        self.inner, self.channels = inner, channels

    def forward(self, t: Tensor, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Raise FlowError: for samples z (B, C, H, W) alone there is no field."""
        shape = ", ".join(map(str, (self.channels, *self.shape[1:])))
        raise FlowError(
            "this velocity network is conditioned on an image: pass Condition(image=…) of shape "
            f"(B, {shape})"
        )

    def with_image(self, image: Tensor) -> Velocity:
        """Return the field v(t, z | image) of images (B, K, H, W), which shares the weights.

        Raises:
            FlowError: the images have another shape.
        """
        expected = (self.channels, *self.shape[1:])
        if tuple(image.shape[1:]) != expected:
            raise FlowError(
                f"expected images of shape {expected} as the condition, found "
                f"{tuple(image.shape[1:])}"
            )
        return ImageConditioned(self.inner, image)


class ImageConditioned(Velocity):
    """The field v(t, z | c) of B samples whose images c (B, K, H, W) are known."""

    def __init__(self, inner: Velocity, image: Tensor) -> None:
        shape = (inner.shape[0] - image.shape[1], *inner.shape[1:])
        super().__init__(shape, inner.classes)
        self.inner, self.image = inner, image

    def forward(self, t: Tensor, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Evaluate the field at z (B, C, H, W), or at m copies (m·B, C, H, W) of the batch."""
        image = self.image.to(z.dtype).repeat(z.shape[0] // self.image.shape[0], 1, 1, 1)
        return self.inner(t, torch.cat([z, image], 1), *optional(labels))[:, : self.shape[0]]
