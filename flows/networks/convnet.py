"""Velocity fields on latent grids (C, H, W): a convolutional network and a small UNet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flows.errors import FlowError
from flows.networks.base import Velocity
from flows.networks.config import VelocityConfig
from flows.networks.layers import ContextFeatures, zero_

#: largest side of a grid on whose upper level the UNet has attention
_MAX_ATTENTION_SIDE = 8


class ConvVelocity(Velocity):
    """A stack of ``depth`` 3×3 convolutions, scaled and shifted by functions of t.

    Each layer is x ← σ(conv(x) ⊙ (1 + a(t)) + b(t)), residual from the second on. It has no
    normalisation, so the field is smooth and cheap: the right size for the paper's small latents.

    Raises:
        FlowError: the shape is not (C, H, W).
    """

    def __init__(self, config: VelocityConfig, shape: tuple[int, ...]) -> None:
        _require_grid(config.kind, shape)
        super().__init__(shape, config.classes)
        channels, width = shape[0], config.width
        self.activation = config.activation_or("softplus20")
        self.features = ContextFeatures(config)
        if not self.features.empty:
            self.modulation = nn.Linear(config.time_features, 2 * width * config.depth)
            zero_(self.modulation)
        self.convs = nn.ModuleList(
            nn.Conv2d(width if index else channels, width, 3, padding=1)
            for index in range(config.depth)
        )
        self.output = nn.Conv2d(width, channels, 3, padding=1)
        if config.zero_init:
            zero_(self.output)

    def forward(self, t: Tensor, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Evaluate the network at z (B, C, H, W); see :class:`Velocity`."""
        context = self.features(t, labels)
        modulations: Sequence[Tensor | None] = [None] * len(self.convs)
        if context is not None:
            modulations = self.modulation(context)[:, :, None, None].chunk(len(self.convs), dim=1)
        hidden = z
        for index, (conv, modulation) in enumerate(zip(self.convs, modulations, strict=True)):
            branch = self.activation(_modulate(conv(hidden), modulation))
            hidden = hidden + branch if index else branch
        return self.output(hidden)


class ResidualBlock(nn.Module):
    """A residual block x + conv(σ(GN(conv(σ(GN(x)))) ⊙ (1 + a) + b)) with scale a and shift b.

    Where outputs and inputs differ, a 1×1 convolution replaces the skip. An embedding of 0
    features gives a = b = 0.
    """

    def __init__(
        self, inputs: int, outputs: int, embedding: int, activation: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.activation = activation
        self.norm_in = nn.GroupNorm(_groups(inputs), inputs)
        self.conv_in = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * outputs) if embedding else None
        self.norm_out = nn.GroupNorm(_groups(outputs), outputs)
        self.conv_out = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)
        if self.modulation is not None:
            zero_(self.modulation)

    def forward(self, x: Tensor, embedding: Tensor | None) -> Tensor:
        """Map x (B, inputs, H, W) and embedding (1, E) or (B, E) to (B, outputs, H, W)."""
        modulation = None
        if self.modulation is not None:
            modulation = self.modulation(embedding)[:, :, None, None]
        hidden = self.conv_in(self.activation(self.norm_in(x)))
        hidden = _modulate(self.norm_out(hidden), modulation)
        return self.skip(x) + self.conv_out(self.activation(hidden))


class Attention(nn.Module):
    """Residual self-attention over the H·W positions.

    It uses plain matrix products, because PyTorch's fused kernels have no forward-mode derivative.
    The channels are a multiple of the heads.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(_groups(channels), channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Add the attention to x (B, C, H, W)."""
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm(x))  # reshape without −1, which an empty batch does not allow
        qkv = qkv.reshape(batch, 3, self.heads, channels // self.heads, height * width)
        query, key, value = qkv.unbind(1)
        weights = (query.transpose(-1, -2) @ key / math.sqrt(query.shape[-2])).softmax(dim=-1)
        mixed = (value @ weights.transpose(-1, -2)).reshape(batch, channels, height, width)
        return x + self.out(mixed)


class UNetVelocity(Velocity):
    """A small UNet with at most two levels, conditioned on the time and the class.

    Patches of ``patch`` x ``patch`` positions are folded into channels first. If the folded H and
    W are even, there is a lower level with twice the width. Each level has ``depth`` residual
    blocks each way. The lower level has attention, and so has the upper one on grids up to 8x8.

    Raises:
        FlowError: the shape is not (C, H, W), the patches do not divide it, or the heads do not
            divide the channels.
    """

    def __init__(self, config: VelocityConfig, shape: tuple[int, ...]) -> None:
        _require_grid(config.kind, shape)
        super().__init__(shape, config.classes)
        self.patch, width, depth = config.patch, config.width, config.depth
        if shape[1] % self.patch or shape[2] % self.patch:
            raise FlowError(
                f"velocity.patch={self.patch} does not divide a grid of {shape[1]}x{shape[2]}"
            )
        channels = shape[0] * self.patch**2
        shape = (channels, shape[1] // self.patch, shape[2] // self.patch)
        self.two_levels = shape[1] % 2 == 0 and shape[2] % 2 == 0
        low = 2 * width if self.two_levels else width
        attends = bool(config.heads) and self.two_levels and max(shape[1:]) <= _MAX_ATTENTION_SIDE
        least = width if attends else low
        if config.heads and least % config.heads:
            raise FlowError(
                f"velocity.width gives {least} channels where the unet attends, which "
                f"{config.heads} attention heads do not divide"
            )
        self.activation = config.activation_or("silu")
        self.features = ContextFeatures(config)
        embedding = 0
        if not self.features.empty:
            embedding = 4 * width
            self.time = nn.Linear(config.time_features, embedding)
        self.input = nn.Conv2d(channels, width, 3, padding=1)
        self.encoder = self._stack(width, width, depth if self.two_levels else 0, embedding)
        self.mix_in = Attention(width, config.heads) if attends else nn.Identity()
        self.down = nn.Conv2d(width, low, 3, 2, 1) if self.two_levels else nn.Identity()
        self.middle = self._stack(low, low, depth, embedding)
        self.attention = Attention(low, config.heads) if config.heads else nn.Identity()
        self.middle_out = self._stack(low, low, 1, embedding)
        self.up = nn.Conv2d(low, width, 3, padding=1) if self.two_levels else nn.Identity()
        joined = 2 * width if self.two_levels else width
        self.decoder = self._stack(joined, width, depth if self.two_levels else 0, embedding)
        self.mix_out = Attention(width, config.heads) if attends else nn.Identity()
        self.norm = nn.GroupNorm(_groups(width), width)
        self.output = nn.Conv2d(width, channels, 3, padding=1)
        if config.zero_init:
            zero_(self.output)

    def _stack(self, inputs: int, outputs: int, depth: int, embedding: int) -> nn.ModuleList:
        return nn.ModuleList(
            ResidualBlock(outputs if index else inputs, outputs, embedding, self.activation)
            for index in range(depth)
        )

    def forward(self, t: Tensor, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Evaluate the network at z (B, C, H, W); see :class:`Velocity`."""
        context = self.features(t, labels)
        embedding = None if context is None else self.activation(self.time(context))
        hidden = self.input(F.pixel_unshuffle(z, self.patch))
        for block in self.encoder:
            hidden = block(hidden, embedding)
        hidden = skip = self.mix_in(hidden)
        hidden = self.down(hidden)
        for block in self.middle:
            hidden = block(hidden, embedding)
        hidden = self.attention(hidden)
        for block in self.middle_out:
            hidden = block(hidden, embedding)
        if self.two_levels:
            hidden = self.up(F.interpolate(hidden, scale_factor=2.0, mode="nearest"))
            hidden = torch.cat([hidden, skip], dim=1)
        for block in self.decoder:
            hidden = block(hidden, embedding)
        out = self.output(self.activation(self.norm(self.mix_out(hidden))))
        return F.pixel_shuffle(out, self.patch)


def _modulate(x: Tensor, modulation: Tensor | None) -> Tensor:
    """Compute x ⊙ (1 + a) + b for x (B, C, H, W) and a and b together, (1 or B, 2C, 1, 1)."""
    if modulation is None:
        return x
    scale, shift = modulation.chunk(2, dim=1)
    return torch.addcmul(shift, x, 1 + scale)


def _groups(channels: int) -> int:
    """Return the largest number of groups up to 8 that divides the channels."""
    return next(groups for groups in range(min(8, channels), 0, -1) if channels % groups == 0)


def _require_grid(kind: str, shape: tuple[int, ...]) -> None:
    if len(shape) != 3:
        raise FlowError(
            f"a {kind} velocity needs samples of shape (C, H, W), found {tuple(shape)}; "
            "use mlp or resmlp for flat samples"
        )
