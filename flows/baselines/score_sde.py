"""ScoreSDE: the variance-preserving diffusion, with its probability-flow ODE."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from flows.baselines.cnf import FlowModel, flow_of
from flows.block import Block
from flows.errors import FlowError
from flows.networks.base import Velocity
from flows.networks.config import VelocityConfig
from flows.networks.registry import make_velocity
from flows.noise import draw_gaussian


@dataclass(frozen=True)
class ScoreSdeConfig:
    """The configuration of ScoreSDE.

    Attributes:
        network: network that predicts the noise; it sees the time.
        beta_min: β(0), positive.
        beta_max: β(1), above β(0).
        start: first time ε in (0, 1): training, likelihood and samples begin there, because the
            score is not bounded at 0.

    Raises:
        FlowError: a value is out of range.
    """

    network: VelocityConfig = field(
        default_factory=lambda: VelocityConfig("resmlp", width=64, depth=2)
    )
    beta_min: float = 0.1
    beta_max: float = 20.0
    start: float = 1e-3

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 < self.beta_min < self.beta_max < float("inf"):
            raise FlowError(
                f"scoresde.beta_min and beta_max are {self.beta_min} and {self.beta_max}; "
                "expected 0 < beta_min < beta_max"
            )
        if not 0 < self.start < 1:
            raise FlowError(f"scoresde.start is {self.start}; expected a number in (0, 1)")

    def beta(self, t: Tensor) -> Tensor:
        """Compute β(t) = β_min + t (β_max − β_min) for t of any shape (…)."""
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the factors a and σ of z_t = a z_0 + σ g for t of any shape (…).

        The factors are

            a² = exp(−∫₀ᵗ β(s) ds),  σ² = 1 − a²
        """
        exponent = self.beta_min * t + t.square() * (self.beta_max - self.beta_min) / 2
        return (-exponent / 2).exp(), (-torch.expm1(-exponent)).sqrt()


class ProbabilityFlow(Velocity):
    """The velocity of the ODE that has the marginals of the diffusion.

        dz/dτ = −½ β(τ) (z + s(τ, z)),  s = −network(τ, z) / σ(τ),  τ = ε + (1 − ε) t

    Args:
        network: predicts the noise g from z_τ (B, D) and τ.
        config: β and ε.
    """

    def __init__(self, network: Velocity, config: ScoreSdeConfig) -> None:
        super().__init__(network.shape)
        self.network = network
        self.config = config

    def forward(self, t: Tensor, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Compute dz/dt at z (B, D); see :class:`Velocity`."""
        length = 1 - self.config.start
        tau = self.config.start + length * t
        rate, sigma = self.config.beta(tau), self.config.marginal(tau)[1]
        if tau.dim() == 1:
            rate, sigma = rate[:, None], sigma[:, None]
        return -length * rate / 2 * (z - self.network(tau, z) / sigma)


class ScoreSde(FlowModel):
    """A diffusion that is trained by denoising score matching.

        loss = E ‖network(τ, a z_0 + σ g) − g‖²,  τ ~ U(ε, 1),  g ~ N(0, I)

    This weighs the score matching at τ by σ². The likelihood is that of the probability-flow ODE
    from τ = ε to 1, and the noise at τ = 1 is taken to be N(0, I).

    Args:
        config: the configuration.
        dim: D.
        generator: source of the initial weights.

    Reference: Song et al., "Score-based generative modeling through stochastic differential
    equations" (ICLR 2021), §3.4, §4.3 and Appendix B.
    """

    def __init__(
        self, config: ScoreSdeConfig, dim: int, generator: torch.Generator | None = None
    ) -> None:
        velocity = ProbabilityFlow(make_velocity(config.network, (dim,), generator), config)
        super().__init__(flow_of(dim, [Block(velocity)]))
        self.config = config

    @property
    def network(self) -> Velocity:
        """Return the network that predicts the noise."""
        velocity = self.flow[0].velocity
        assert isinstance(velocity, ProbabilityFlow)
        return velocity.network

    def loss(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Compute the denoising loss of a batch z (B, D), a scalar."""
        uniform = torch.rand(len(z), generator=generator, dtype=z.dtype).to(z.device)
        tau = self.config.start + (1 - self.config.start) * uniform
        noise = draw_gaussian(tuple(z.shape), z, generator)
        scale, sigma = self.config.marginal(tau)
        noisy = scale[:, None] * z + sigma[:, None] * noise
        return (self.network(tau, noisy) - noise).square().sum(dim=1).mean()
