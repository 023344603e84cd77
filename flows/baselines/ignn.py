"""IGNN on vectors: residual blocks with a transport cost in place of a spectral constraint."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from flows.baselines.residual import FixedPoint, InvertibleBlock, ResidualFlow
from flows.errors import FlowError
from flows.likelihood import log_normal
from flows.networks.config import VelocityConfig
from flows.networks.registry import make_velocity


@dataclass(frozen=True)
class IgnnConfig:
    """The configuration of the plain-vector form of the invertible graph neural network.

    Attributes:
        velocity: network of a residual branch; it must not see the time.
        blocks: residual blocks, at least 1.
        transport: weight μ of the transport cost, not negative.
        fixed_point: settings of the inverse.

    Raises:
        FlowError: a value is out of range, or the network sees the time.
    """

    velocity: VelocityConfig = field(
        default_factory=lambda: VelocityConfig("mlp", width=64, depth=2, autonomous=True)
    )
    blocks: int = 8
    transport: float = 1.0
    fixed_point: FixedPoint = field(default_factory=FixedPoint)

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.blocks < 1:
            raise FlowError(f"ignn.blocks is {self.blocks}; expected at least 1")
        if not 0 <= self.transport < float("inf"):
            raise FlowError(
                f"ignn.transport is {self.transport}; expected a finite number from 0 on"
            )
        if not self.velocity.autonomous and self.velocity.kind != "linear":
            raise FlowError(
                "ignn.velocity depends on time, but a residual block has none; set "
                "velocity.autonomous"
            )


class Ignn(ResidualFlow):
    """Residual blocks without a constraint, trained by maximum likelihood with a transport cost.

        loss = E[ −log N(z_K; 0, I) − Σ_k log |det(I + ∂g_k)| + μ Σ_k ‖g_k(z_{k−1})‖² ]

    Small movements make the blocks invertible in practice, but nothing guarantees it: `Decoded`
    says for which samples the fixed point failed. The power series of the log-determinant needs
    ‖∂g‖ < 1, so training uses the full Jacobian.

    Args:
        config: the configuration.
        dim: D.
        generator: source of the initial weights.

    Reference: Xu, Cheng, Xie, "Invertible neural networks for graph prediction" (2022), for
    the transport cost; their graph networks are dense layers here.
    """

    def __init__(
        self, config: IgnnConfig, dim: int, generator: torch.Generator | None = None
    ) -> None:
        layers = [
            InvertibleBlock(make_velocity(config.velocity, (dim,), generator))
            for _ in range(config.blocks)
        ]
        super().__init__(dim, layers, config.fixed_point)
        self.config = config

    def loss(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Compute the objective of a batch z (B, D), a scalar in nats."""
        log_det, movement = z.new_zeros(len(z)), z.new_zeros(len(z))
        for layer in self.layers:
            assert isinstance(layer, InvertibleBlock)
            end, change, _ = layer.with_log_det(z)
            movement = movement + (end - z).square().sum(dim=1)
            z, log_det = end, log_det + change
        return (self.config.transport * movement - log_normal(z) - log_det).mean()

    @torch.no_grad()
    def folded(self, z_0: Tensor) -> Tensor:
        """Return bool (n,), whether a block turns the orientation at a sample of z_0 (n, D)."""
        self.check_samples(z_0)
        turned = torch.zeros(len(z_0), dtype=torch.bool, device=z_0.device)
        for layer in self.layers:
            assert isinstance(layer, InvertibleBlock)
            z_0, _, sign = layer.with_log_det(z_0)
            turned |= sign <= 0
        return turned
