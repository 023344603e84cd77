"""Velocity fields on grids (C, H, W) by a transformer of patches, conditioned by adaLN-zero.

Reference: Peebles, Xie, "Scalable diffusion models with transformers" (DiT, 2023), and Ma et al.,
"SiT" (2024), who train it on velocities.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flows.errors import FlowError
from flows.networks.base import Velocity
from flows.networks.config import VelocityConfig
from flows.networks.layers import (
    ClassEmbedding,
    ContextFeatures,
    has_tangent,
    layer_norm,
    require_grid,
    require_patches,
    zero_,
)

_EPS = 1e-6
_STD = 0.02
_EXPANSION = 4  # of the features inside a block's MLP
_BASE = 1e-4  # base of the geometric frequencies of the positions


class Modulation(nn.Module):
    """The scales, shifts and gates W σ(c) + b of a condition c (1 or B, F); b without any.

    They start at 0.
    """

    def __init__(self, features: int, outputs: int, conditioned: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(features, outputs) if conditioned else None
        self.bias = None if conditioned else nn.Parameter(torch.zeros(outputs))
        if self.linear is not None:
            zero_(self.linear)

    def forward(self, condition: Tensor | None) -> Tensor:
        """Compute the modulation (B, 1, outputs); a shared time has B = 1."""
        if self.linear is None or condition is None:
            assert self.bias is not None
            return self.bias[None, None]
        return self.linear(F.silu(condition))[:, None]


class DitBlock(nn.Module):
    """A transformer block whose norms and branches a condition shifts, scales and gates.

        x ← x + g₁ attention(LN(x) (1 + a₁) + b₁)
        x ← x + g₂ W₂ σ(W₁ (LN(x) (1 + a₂) + b₂))

    Every gate starts at 0, so that a new block is the identity.
    """

    def __init__(
        self, width: int, heads: int, conditioned: bool, activation: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.heads, self.activation = heads, activation
        self.modulation = Modulation(width, 6 * width, conditioned)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, _EXPANSION * width)
        self.down = nn.Linear(_EXPANSION * width, width)

    def forward(self, x: Tensor, condition: Tensor | None, fused: bool) -> Tensor:
        """Map tokens x (B, N, W) to (B, N, W); see `attend` for ``fused``."""
        shift, scale, gate, shift_up, scale_up, gate_up = self.modulation(condition).chunk(6, -1)
        batch, tokens, width = x.shape
        qkv = self.qkv(torch.addcmul(shift, layer_norm(x, _EPS), 1 + scale))
        qkv = qkv.reshape(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = attend(query, key, value, fused)
        x = torch.addcmul(x, gate, self.out(mixed.transpose(1, 2).reshape(batch, tokens, width)))
        branch = self.up(torch.addcmul(shift_up, layer_norm(x, _EPS), 1 + scale_up))
        return torch.addcmul(x, gate_up, self.down(self.activation(branch)))


class DitVelocity(Velocity):
    """A diffusion transformer: p × p patches as tokens, ``depth`` blocks, and adaLN-zero.

    The condition of the blocks is

        c = W₂ silu(W₁ f(t) + b₁) + b₂ + e(y),   f(t) = (sin ω_i t, cos ω_i t),

    with the frequencies ω of `ContextFeatures`, whose fastest has one period in a block. DiT's own
    features count a thousand steps. The positions of the tokens are fixed sines and cosines of
    columns and rows. A field that depends on neither time nor class has constants instead of
    modulations of c.

    Samples without gradients, as in training by regression and in sampling, have fused attention.
    Where the field is differentiated in z, as by JKO's divergence, attention is plain products,
    because the fused kernels have neither second nor forward-mode derivatives.

    Raises:
        FlowError: the shape is not (C, H, W), the patches do not divide it, or the width is no
            multiple of the heads and of 4.
    """

    positions: Tensor

    def __init__(self, config: VelocityConfig, shape: tuple[int, ...]) -> None:
        require_grid(config.kind, shape)
        super().__init__(shape, config.classes)
        require_patches(config.patch, shape)
        (width,) = config.widths
        unit = math.lcm(4, max(config.heads, 1))
        if not config.heads or width % unit:
            raise FlowError(
                f"velocity.width is {width} and velocity.heads {config.heads} for a dit; expected "
                f"at least 1 head and a width that is a multiple of {unit}"
            )
        self.patch = config.patch
        self.grid = (shape[1] // self.patch, shape[2] // self.patch)
        self.features = ContextFeatures(replace(config, classes=0))
        if not config.autonomous:
            size = config.time_features
            self.time = nn.Sequential(nn.Linear(size, width), nn.SiLU(), nn.Linear(width, width))
        self.label = ClassEmbedding(config.classes, width)
        conditioned = bool(config.classes) or not config.autonomous
        activation = config.activation_or("gelu-tanh")
        self.input = nn.Conv2d(shape[0], width, self.patch, self.patch)
        self.register_buffer("positions", _positions(width, self.grid), persistent=False)
        self.blocks = nn.ModuleList(
            DitBlock(width, config.heads, conditioned, activation) for _ in range(config.depth)
        )
        self.modulation = Modulation(width, 2 * width, conditioned)
        self.output = nn.Linear(width, self.patch**2 * shape[0])
        self._initialise(config)

    def forward(self, t: Tensor, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Evaluate the network at z (B, C, H, W); see :class:`Velocity`."""
        fused = not (z.requires_grad or has_tangent(z))
        condition = self.condition(t, labels)
        x = self.input(z).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x, condition, fused)
        shift, scale = self.modulation(condition).chunk(2, -1)
        x = self.output(torch.addcmul(shift, layer_norm(x, _EPS), 1 + scale))
        (channels, height, width), (rows, columns) = self.shape, self.grid
        x = x.reshape(z.shape[0], rows, columns, self.patch, self.patch, channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(z.shape[0], channels, height, width)

    def condition(self, t: Tensor, labels: Tensor | None = None) -> Tensor | None:
        """Compute c (B, W) at times t, 0-d (B = 1) or (B,), and labels (B,); None without both."""
        features = self.features(t)
        if features is not None:
            return self.label(self.time(features), labels)
        constant = self.label(t.new_zeros(1, 1), labels)
        return None if self.label.embedding is None else constant

    @torch.no_grad()
    def _initialise(self, config: VelocityConfig) -> None:
        """Draw the initial weights of DiT: Xavier's, and 0 for biases, gates and the output."""
        layers = [layer for block in self.blocks for layer in block.children()]
        for layer in [*layers, self.output]:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        nn.init.xavier_uniform_(self.input.weight.flatten(1))
        for layer in [] if config.autonomous else [self.time[0], self.time[2]]:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=_STD)
                nn.init.zeros_(layer.bias)
        if self.label.embedding is not None:
            nn.init.normal_(self.label.embedding.weight, std=_STD)
        if config.zero_init:
            zero_(self.output)


def attend(query: Tensor, key: Tensor, value: Tensor, fused: bool) -> Tensor:
    """Compute softmax(Q Kᵀ / √d) V for heads (B, heads, N, d), by a fused kernel or by products.

    The products have derivatives of all orders and in forward mode.
    """
    if fused:
        return F.scaled_dot_product_attention(query, key, value)
    weights = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    return weights.softmax(dim=-1) @ value


def _positions(width: int, grid: tuple[int, int]) -> Tensor:
    """Return the positions (rows · columns, W): sines and cosines of the column, then the row.

    They are sin(ω_i x), cos(ω_i x),   ω_i = 10000^(−i / (W / 4)),  i = 0 … W / 4 − 1.
    """
    omega = _BASE ** (torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, columns = (torch.arange(side, dtype=torch.float64)[:, None] * omega for side in grid)
    row, column = (torch.cat([phase.sin(), phase.cos()], 1) for phase in (rows, columns))
    across = column[None].expand(grid[0], -1, -1)
    down = row[:, None].expand(-1, grid[1], -1)
    positions = torch.cat([across, down], 2).flatten(0, 1)
    return positions.to(torch.get_default_dtype())
