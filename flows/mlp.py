"""Velocity fields on flat samples: linear, plain MLP (the paper's), residual MLP."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flows.velocity_base import TimeFeatures, Velocity, VelocityConfig, zero_


class LinearVelocity(Velocity):
    """v(z) = A z + b: the field whose map and log-det are known, expm(A) and tr A."""

    def __init__(self, config: VelocityConfig, shape: tuple[int, ...]) -> None:
        super().__init__(shape)
        self.affine = nn.Linear(self.dim, self.dim)
        if config.zero_init:
            zero_(self.affine)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        """See :class:`Velocity`; t is not used."""
        return self.affine(z.flatten(1)).view_as(z)


class MlpVelocity(Velocity):
    """A plain MLP on (z, t), as in the paper's two-dimensional experiments."""

    def __init__(self, config: VelocityConfig, shape: tuple[int, ...]) -> None:
        super().__init__(shape)
        widths = config.hidden
        self.first = nn.Linear(self.dim + 1, widths[0])
        self.middle = nn.ModuleList(
            nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True)
        )
        self.last = nn.Linear(widths[-1], self.dim)
        self.activation = config.activation_or("softplus20")
        if config.zero_init:
            zero_(self.last)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        """See :class:`Velocity`."""
        first = self.first
        # W (z, t) = W_z z + t w_t: the time goes into the bias and no concatenated copy is made.
        weight, column = first.weight[:, : self.dim], first.weight[:, self.dim]
        if t.dim() == 0:
            hidden = F.linear(z.flatten(1), weight, first.bias + t * column)
        else:
            hidden = F.linear(z.flatten(1), weight, first.bias) + t[:, None] * column
        for layer in self.middle:
            hidden = layer(self.activation(hidden))
        return self.last(self.activation(hidden)).view_as(z)


class ResidualLayer(nn.Module):
    """x ← x + W₂ σ(W₁ (LN(x) ⊙ (1 + a(t)) + b(t)) + c)."""

    def __init__(self, width: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.activation = activation
        self.up = nn.Linear(width, width)
        self.down = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Maps x (B, W), with scale and shift (1 or B, W), to (B, W)."""
        branch = self.activation(self.up(_modulated_norm(x, scale, shift)))
        # addmm adds the branch to the stream inside the matrix product.
        return torch.addmm(x, branch, self.down.weight.t())


class ResidualMlpVelocity(Velocity):
    """A residual MLP whose normalisations are scaled and shifted by the time.

    ``depth`` residual layers between a linear map in and a linear map out. The residual stream is
    never normalised, so v may grow linearly in z, as the exact field of a Gaussian does.
    """

    def __init__(self, config: VelocityConfig, shape: tuple[int, ...]) -> None:
        super().__init__(shape)
        width = config.width
        self.activation = config.activation_or("silu")
        self.features = TimeFeatures(config.time_features)
        self.time = nn.Linear(config.time_features, width)
        self.modulation = nn.Linear(width, 2 * width * config.depth)
        self.input = nn.Linear(self.dim, width)
        self.layers = nn.ModuleList(
            ResidualLayer(width, self.activation) for _ in range(config.depth)
        )
        self.output = nn.Linear(width, self.dim)
        zero_(self.modulation)
        if config.zero_init:
            zero_(self.output)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        """See :class:`Velocity`."""
        hidden = self.input(z.flatten(1))
        embedding = self.activation(self.time(self.features(t)))
        modulations = self.modulation(embedding).chunk(len(self.layers), dim=1)
        for layer, modulation in zip(self.layers, modulations, strict=True):
            hidden = layer(hidden, *modulation.chunk(2, dim=1))
        return self.output(hidden).view_as(z)


def _modulated_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """LN(x) ⊙ (1 + scale) + shift, in one kernel when all samples share the time."""
    width = (x.shape[-1],)
    if scale.shape[0] == 1:
        return F.layer_norm(x, width, 1 + scale[0], shift[0])
    return torch.addcmul(shift, F.layer_norm(x, width), 1 + scale)
