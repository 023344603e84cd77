"""FFJORD: continuous normalizing flows by maximum likelihood, and RNODE's two regularisers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from flows.baselines.cnf import FlowModel, flow_of
from flows.block import Block
from flows.errors import FlowError
from flows.likelihood import log_normal
from flows.networks.base import Velocity
from flows.networks.config import VelocityConfig
from flows.networks.registry import make_velocity
from flows.noise import draw_rademacher
from flows.solving.divergence import Divergence
from flows.solving.solver import SolverConfig


@dataclass(frozen=True)
class FfjordConfig:
    """The configuration of FFJORD; the defaults are those of its two-dimensional experiments.

    Attributes:
        velocity: network of a block, which sees the time.
        blocks: neural ODEs in a row, at least 1.
        solver: solver of training. A fixed grid overestimates the likelihood of a field that
            depends on time, so the default is adaptive.
        kinetic: weight λ_K of ∫‖v‖² dt, not negative.
        jacobian: weight λ_J of ∫‖∂v/∂z‖_F² dt, not negative.

    Raises:
        FlowError: a value is out of range.
    """

    velocity: VelocityConfig = field(
        default_factory=lambda: VelocityConfig("mlp", width=64, depth=3, activation="tanh")
    )
    blocks: int = 1
    solver: SolverConfig = field(default_factory=lambda: SolverConfig(method="dopri5"))
    kinetic: float = 0.0
    jacobian: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.blocks < 1:
            raise FlowError(f"ffjord.blocks is {self.blocks}; expected at least 1")
        for name in ("kinetic", "jacobian"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise FlowError(
                    f"ffjord.{name} is {getattr(self, name)}; expected a finite number from 0 on"
                )


class RunningCosts(Divergence):
    """Hutchinson's estimate of ∇·v, with the running costs of RNODE.

    The rows of :meth:`estimates` are εᵀ(∂v/∂z)ε and the costs ‖v‖² and ‖εᵀ ∂v/∂z‖², whose mean
    over ε is ‖∂v/∂z‖_F². One probe and one product of the reverse mode serve all three.

    Reference: Finlay, Jacobsen, Nurbekyan, Oberman, "How to train your neural ODE" (2020).
    """

    costs = 2
    random = True

    def draw_probe(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw one Rademacher probe (1, B, *shape) for samples z (B, *shape)."""
        return draw_rademacher((1, *z.shape), z, generator)

    def estimates(
        self, velocity: Velocity, t: Tensor, z: Tensor, eps: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute v (B, *shape) and the three rows (3, B); see :class:`Divergence`."""
        eps = self._require(z, eps)
        training = torch.is_grad_enabled()
        with torch.enable_grad():
            x = z if training and z.requires_grad else z.detach().requires_grad_()
            v = velocity(t, x)
            (product,) = torch.autograd.grad(v, x, eps[0], create_graph=training)
            rows = [(product * eps[0]), v.square(), product.square()]
            costs = torch.stack([row.flatten(1).sum(dim=1) for row in rows])
        return (v, costs) if training else (v.detach(), costs.detach())


class Ffjord(FlowModel):
    """Neural ODEs that are trained together, by maximum likelihood.

        loss = E[ −log N(z_K; 0, I) − Σ_k ∫∇·v_k dt + λ_K Σ_k ∫‖v_k‖² dt + λ_J Σ_k ∫‖∂v_k‖_F² dt ]

    Args:
        config: the configuration.
        dim: D.
        generator: source of the initial weights.

    Reference: Grathwohl et al., "FFJORD" (ICLR 2019); Finlay et al. (2020) for the regularisers.
    """

    def __init__(
        self, config: FfjordConfig, dim: int, generator: torch.Generator | None = None
    ) -> None:
        nets = [make_velocity(config.velocity, (dim,), generator) for _ in range(config.blocks)]
        super().__init__(flow_of(dim, [Block(net, config.solver) for net in nets]))
        self.config = config

    def loss(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Compute the regularised negative log-likelihood of z (B, D), a scalar in nats.

        Raises:
            SolveError: a block cannot be solved.
        """
        log_det, costs, estimator = z.new_zeros(len(z)), z.new_zeros(2, len(z)), RunningCosts()
        for block in self.flow:
            eps = estimator.draw_probe(z, generator)
            moved = block.transport(z, divergence=estimator, eps=eps)
            assert moved.log_det is not None and moved.costs is not None
            z, log_det, costs = moved.z, log_det + moved.log_det, costs + moved.costs
        kinetic, jacobian = costs
        penalty = self.config.kinetic * kinetic + self.config.jacobian * jacobian
        return (penalty - log_normal(z) - log_det).mean()
