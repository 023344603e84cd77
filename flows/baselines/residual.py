"""Residual blocks x ↦ x + g(x): log-determinants and the fixed-point inverse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flows.baselines.base import Decoded, DensityModel
from flows.errors import FlowError
from flows.likelihood import LogProb, log_normal
from flows.networks.base import Velocity

#: samples whose Jacobians are in memory together
CHUNK = 512


@dataclass(frozen=True)
class FixedPoint:
    """The settings of the fixed-point inverse.

    Attributes:
        tolerance: largest change of a coordinate in the last iteration, positive.
        iterations: largest number of iterations, at least 1.

    Raises:
        FlowError: a value is out of range.
    """

    tolerance: float = 1e-5
    iterations: int = 500

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 < self.tolerance < math.inf or self.iterations < 1:
            raise FlowError(
                f"the fixed point has tolerance {self.tolerance} and {self.iterations} "
                "iterations; expected a positive tolerance and at least 1 iteration"
            )


class Affine(nn.Module):
    """An elementwise affine map x ↦ eᵃ ⊙ x + b, initialised so that a batch has mean 0 and std 1.

    Args:
        dim: D.

    Reference: Kingma, Dhariwal, "Glow" (2018), actnorm.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(dim))
        self.shift = nn.Parameter(torch.zeros(dim))
        self.initialised: Tensor
        self.register_buffer("initialised", torch.tensor(False))

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Set the map from a batch x (B, D), once; later calls change nothing."""
        if bool(self.initialised) or len(x) < 2:
            return
        std = x.std(dim=0).clamp(min=1e-6)
        self.log_scale.copy_(-std.log())
        self.shift.copy_(-x.mean(dim=0) / std)
        self.initialised.fill_(True)

    def forward(self, x: Tensor) -> Tensor:
        """Compute eᵃ ⊙ x + b for x (B, D)."""
        return self.log_scale.exp() * x + self.shift

    def inverse(self, y: Tensor) -> Tensor:
        """Compute (y − b) / eᵃ for y (B, D)."""
        return (y - self.shift) * (-self.log_scale).exp()


class InvertibleBlock(nn.Module):
    """The map x ↦ u + g(u), where u is x or an elementwise affine map of x.

    Args:
        branch: g, an autonomous field on vectors.
        affine: the map before it, or None.
    """

    def __init__(self, branch: Velocity, affine: Affine | None = None) -> None:
        super().__init__()
        self.branch = branch
        self.affine = affine

    def prepare(self, x: Tensor) -> Tensor:
        """Apply the affine map to x (B, D)."""
        return x if self.affine is None else self.affine(x)

    def residual(self, u: Tensor) -> Tensor:
        """Compute g(u) for u (B, D)."""
        return self.branch(u.new_zeros(()), u)

    def forward(self, x: Tensor) -> Tensor:
        """Compute u + g(u) for x (B, D)."""
        u = self.prepare(x)
        return u + self.residual(u)

    def with_log_det(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the map and log |det| by the full Jacobian, at D derivatives per sample.

        Args:
            x: samples (B, D).

        Returns:
            the map (B, D), log |det ∂y/∂x| in nats, (B,), and the sign of the determinant, (B,).
            A map whose sign differs between samples is not invertible.
        """
        u = self.prepare(x)
        basis = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        tangents = basis[:, None, :].expand(-1, len(x), -1)
        g, columns = self.branch.directional(u.new_zeros(()), u, tangents)
        sign, log_det = _slogdet(basis + columns.permute(1, 2, 0))
        return u + g, log_det + self.affine_log_det(), sign

    def affine_log_det(self) -> Tensor:
        """Return log |det| of the affine map, a scalar."""
        if self.affine is None:
            return torch.zeros((), device=next(self.branch.parameters()).device)
        return self.affine.log_scale.sum()

    @torch.no_grad()
    def inverse(self, y: Tensor, settings: FixedPoint) -> tuple[Tensor, Tensor, int]:
        """Solve u + g(u) = y by u ← y − g(u), and undo the affine map.

        Args:
            y: samples (B, D).
            settings: tolerance and number of iterations.

        Returns:
            x (B, D); bool (B,), whether the last iteration changed no coordinate of a sample by
            more than the tolerance; iterations.
        """
        u, done, steps = y, torch.zeros(len(y), dtype=torch.bool, device=y.device), 0
        while steps < settings.iterations and not bool(done.all()):
            steps += 1
            new = y - self.residual(u)
            done = (new - u).abs().amax(dim=1) <= settings.tolerance  # False for NaN
            u = new
        return (u if self.affine is None else self.affine.inverse(u)), done, steps


class ResidualFlow(DensityModel):
    """A sequence of residual blocks on vectors, data side first.

    Args:
        dim: D.
        layers: the blocks.
        fixed_point: settings of the inverse.
    """

    def __init__(
        self, dim: int, layers: Sequence[InvertibleBlock], fixed_point: FixedPoint
    ) -> None:
        super().__init__(dim)
        self.layers = nn.ModuleList(layers)
        self.fixed_point = fixed_point

    @property
    def blocks(self) -> int:
        """Return the number of blocks."""
        return len(self.layers)

    @torch.no_grad()
    def encode(self, z_0: Tensor) -> Tensor:
        """Map data z_0 (n, D) to noise z_K (n, D)."""
        self.check_samples(z_0)
        for layer in self.layers:
            z_0 = layer(z_0)
        return z_0

    @torch.no_grad()
    def decode_checked(self, z_K: Tensor) -> Decoded:
        """Map noise z_K (n, D) to data by fixed points; a failed block fails the sample."""
        self.check_samples(z_K)
        converged, nfe = torch.ones(len(z_K), dtype=torch.bool, device=z_K.device), 0
        for layer in reversed(self.layers):
            assert isinstance(layer, InvertibleBlock)
            z_K, done, steps = layer.inverse(z_K, self.fixed_point)
            converged, nfe = converged & done, nfe + steps
        return Decoded(z_K, converged.cpu(), nfe)

    @torch.no_grad()
    def log_prob(self, z_0: Tensor, generator: torch.Generator | None = None) -> LogProb:
        """Compute log p(z_0), (n,), for samples (n, D), by the full Jacobian of each block.

        The value is that of a density only where the map is invertible. The inversion error of a
        sample whose inverse was not found is that of the last iterate.
        """
        self.check_samples(z_0)
        values, errors = [], []
        for part in z_0.split(CHUNK):
            z, log_det = part, part.new_zeros(len(part))
            for layer in self.layers:
                assert isinstance(layer, InvertibleBlock)
                z, change, _ = layer.with_log_det(z)
                log_det = log_det + change
            values.append(log_normal(z) + log_det)
            errors.append((self.decode_checked(z).z - part).norm(dim=1))
        return LogProb(torch.cat(values), None, torch.cat(errors), self.blocks, self.dim)


def _slogdet(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Compute sign and log |det|, (B,) each, of matrices (B, D, D).

    The CPU computes those of MPS, which has no kernel for the gradient.
    """
    known = matrix.device.type in ("cpu", "cuda")
    sign, log_det = torch.linalg.slogdet(matrix if known else matrix.cpu())
    return sign.to(matrix.device), log_det.to(matrix.device)
