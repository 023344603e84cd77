"""Velocity fields on latent grids (C, H, W): a convolutional network and a UNet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flows.errors import FlowError
from flows.networks.base import Velocity
from flows.networks.config import VelocityConfig
from flows.networks.layers import ContextFeatures, require_grid, require_patches, zero_

#: largest side of a grid on which levels of the UNet above the lowest have attention
_MAX_ATTENTION_SIDE = 8


class ConvVelocity(Velocity):
    """A stack of ``depth`` 3×3 convolutions, scaled and shifted by functions of t.

    Each layer is x ← σ(conv(x) ⊙ (1 + a(t)) + b(t)), residual from the second on. It has no
    normalisation, so the field is smooth and cheap: the right size for the paper's small latents.

    Raises:
        FlowError: the shape is not (C, H, W).
    """

    def __init__(self, config: VelocityConfig, shape: tuple[int, ...]) -> None:
        require_grid(config.kind, shape)
        super().__init__(shape, config.classes)
        channels, (width,) = shape[0], config.widths
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


@dataclass(frozen=True)
class Stacks:
    """Builder of a UNet's residual blocks and attention."""

    depth: int
    embedding: int
    heads: int
    activation: Callable[[Tensor], Tensor]

    def __call__(self, inputs: int, outputs: int, depth: int | None = None) -> nn.ModuleList:
        """Build ``depth`` residual blocks, of which the first takes ``inputs`` channels."""
        return nn.ModuleList(
            ResidualBlock(
                outputs if index else inputs, outputs, self.embedding, self.activation
            )
            for index in range(self.depth if depth is None else depth)
        )

    def attention(self, channels: int, attends: bool) -> nn.Module:
        """Build attention over some channels, or the identity without."""
        return Attention(channels, self.heads) if attends and self.heads else nn.Identity()


class Level(nn.Module):
    """A level of the UNet below the first: residual blocks and attention, each way.

    It has some width, and the level below it has the width `low`.
    """

    def __init__(self, width: int, low: int, stacks: Stacks, attends: bool) -> None:
        super().__init__()
        self.encoder = stacks(width, width)
        self.mix_in = stacks.attention(width, attends)
        self.down = nn.Conv2d(width, low, 3, 2, 1)
        self.up = nn.Conv2d(low, width, 3, padding=1)
        self.decoder = stacks(2 * width, width)
        self.mix_out = stacks.attention(width, attends)


class UNetVelocity(Velocity):
    """A UNet of any number of levels, conditioned on the time and the class.

    Patches of ``patch`` x ``patch`` positions are folded into channels first. Each level halves
    the grid and has its own width. A single width w stands for two levels, w and 2w. Where a side
    of the folded grid is odd it is one level.

    Each level has ``depth`` residual blocks each way. The lowest level has attention, and so have
    the others on grids up to 8x8. A network of one level has only the blocks of the lowest level.

    Raises:
        FlowError: the shape is not (C, H, W), the patches do not divide it, the levels halve an
            odd side, or the heads do not divide the channels.
    """

    def __init__(self, config: VelocityConfig, shape: tuple[int, ...]) -> None:
        require_grid(config.kind, shape)
        super().__init__(shape, config.classes)
        require_patches(config.patch, shape)
        self.patch = config.patch
        channels = shape[0] * self.patch**2
        sides = (shape[1] // self.patch, shape[2] // self.patch)
        widths = _level_widths(config, sides)
        attends = [max(sides) >> level <= _MAX_ATTENTION_SIDE for level in range(len(widths) - 1)]
        _check_heads(config.heads, widths, attends)
        self.halves = len(widths) > 1
        width, low = widths[0], widths[min(1, len(widths) - 1)]
        self.activation = config.activation_or("silu")
        self.features = ContextFeatures(config)
        embedding = 0
        if not self.features.empty:
            embedding = 4 * width
            self.time = nn.Linear(config.time_features, embedding)
        stacks = Stacks(config.depth, embedding, config.heads, self.activation)
        upper = config.depth if self.halves else 0
        self.input = nn.Conv2d(channels, width, 3, padding=1)
        self.encoder = stacks(width, width, upper)
        self.mix_in = stacks.attention(width, self.halves and attends[0])
        self.down = nn.Conv2d(width, low, 3, 2, 1) if self.halves else nn.Identity()
        self.levels = nn.ModuleList(
            Level(widths[k], widths[k + 1], stacks, attends[k]) for k in range(1, len(attends))
        )
        self.middle = stacks(widths[-1], widths[-1])
        self.attention = stacks.attention(widths[-1], True)
        self.middle_out = stacks(widths[-1], widths[-1], 1)
        self.up = nn.Conv2d(low, width, 3, padding=1) if self.halves else nn.Identity()
        self.decoder = stacks(2 * width, width, upper)
        self.mix_out = stacks.attention(width, self.halves and attends[0])
        self.norm = nn.GroupNorm(_groups(width), width)
        self.output = nn.Conv2d(width, channels, 3, padding=1)
        if config.zero_init:
            zero_(self.output)

    def forward(self, t: Tensor, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Evaluate the network at z (B, C, H, W); see :class:`Velocity`."""
        context = self.features(t, labels)
        embedding = None if context is None else self.activation(self.time(context))
        hidden = self.input(F.pixel_unshuffle(z, self.patch))
        parts, skips = [self, *self.levels] if self.halves else [], list[Tensor]()
        for part in parts:
            for block in part.encoder:
                hidden = block(hidden, embedding)
            skips.append(part.mix_in(hidden))
            hidden = part.down(skips[-1])
        for block in self.middle:
            hidden = block(hidden, embedding)
        hidden = self.attention(hidden)
        for block in self.middle_out:
            hidden = block(hidden, embedding)
        for part in reversed(parts):
            hidden = part.up(F.interpolate(hidden, scale_factor=2.0, mode="nearest"))
            hidden = torch.cat([hidden, skips.pop()], dim=1)
            for block in part.decoder:
                hidden = block(hidden, embedding)
            hidden = part.mix_out(hidden)
        return F.pixel_shuffle(self.output(self.activation(self.norm(hidden))), self.patch)


def _level_widths(config: VelocityConfig, sides: tuple[int, int]) -> tuple[int, ...]:
    """Return the widths of a UNet's levels on a folded grid of sides (H, W)."""
    if not isinstance(config.width, tuple):
        even = not (sides[0] % 2 or sides[1] % 2)
        return (config.width, 2 * config.width) if even else (config.width,)
    factor = 2 ** (len(config.width) - 1)
    if sides[0] % factor or sides[1] % factor:
        raise FlowError(
            f"velocity.width has {len(config.width)} levels on a grid of {sides[0]}x{sides[1]}; "
            f"expected sides that are multiples of {factor}; choose fewer levels or another "
            "velocity.patch"
        )
    return config.width


def _check_heads(heads: int, widths: tuple[int, ...], attends: list[bool]) -> None:
    """Check that attention heads divide the widths of the levels that attend."""
    for width, attend in zip(widths, [*attends, True], strict=True):
        if heads and attend and width % heads:
            raise FlowError(
                f"velocity.width gives {width} channels where the unet attends, which "
                f"{heads} attention heads do not divide; change velocity.width or velocity.heads"
            )


def _modulate(x: Tensor, modulation: Tensor | None) -> Tensor:
    """Compute x ⊙ (1 + a) + b for x (B, C, H, W) and a and b together, (1 or B, 2C, 1, 1)."""
    if modulation is None:
        return x
    scale, shift = modulation.chunk(2, dim=1)
    return torch.addcmul(shift, x, 1 + scale)


def _groups(channels: int) -> int:
    """Return the largest number of groups up to 8 that divides the channels."""
    return next(groups for groups in range(min(8, channels), 0, -1) if channels % groups == 0)
