"""OT-Flow: a neural ODE whose velocity is the gradient of a potential."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flows.baselines.cnf import FlowModel, flow_of
from flows.block import Block
from flows.errors import FlowError
from flows.likelihood import log_normal
from flows.networks.base import Velocity
from flows.noise import initial_weights
from flows.solving.divergence import Divergence
from flows.solving.solver import SolverConfig


@dataclass(frozen=True)
class OtFlowConfig:
    """The configuration of OT-Flow; the defaults are those of its two-dimensional experiments.

    Attributes:
        width: hidden features m of the ResNet, at least 1.
        depth: layers of the ResNet after its first, at least 0; the authors use one.
        rank: rank of the quadratic part, at least 1; at most D + 1 are used.
        solver: solver of training.
        transport: weight of ∫½‖v‖² dt per nat of the likelihood, not negative.
        hjb: weight of the violation of the Hamilton–Jacobi–Bellman equation, not negative.

    Raises:
        FlowError: a value is out of range.
    """

    width: int = 32
    depth: int = 1
    rank: int = 10
    solver: SolverConfig = field(default_factory=lambda: SolverConfig(method="rk4", steps=8))
    transport: float = 0.01
    hjb: float = 0.05

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, least in (("width", 1), ("depth", 0), ("rank", 1)):
            if getattr(self, name) < least:
                raise FlowError(
                    f"otflow.{name} is {getattr(self, name)}; expected at least {least}"
                )
        for name in ("transport", "hjb"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise FlowError(
                    f"otflow.{name} is {getattr(self, name)}; expected a finite number from 0 on"
                )


class PotentialVelocity(Velocity):
    """The velocity v = −∇_z Φ of a potential Φ on s = (z, t).

        Φ(s) = wᵀ u_M(s) + ½ ‖A s‖² + bᵀ s
        u_0 = σ(K_0 s + b_0),  u_i = u_{i−1} + h σ(K_i u_{i−1} + b_i),  h = 1/M

    σ(x) = log(eˣ + e⁻ˣ), whose derivative is tanh. A constant in Φ would change nothing.

    Args:
        config: width, depth M and rank.
        dim: D.

    Reference: Onken, Wu Fung, Li, Ruthotto, "OT-Flow" (AAAI 2021).
    """

    def __init__(self, config: OtFlowConfig, dim: int) -> None:
        super().__init__((dim,))
        width = config.width
        self.first = nn.Linear(dim + 1, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(config.depth))
        self.weight = nn.Parameter(torch.ones(width) / width)
        rank = min(config.rank, dim + 1)
        self.low_rank = nn.Parameter(torch.empty(rank, dim + 1))
        nn.init.xavier_uniform_(self.low_rank)
        self.linear = nn.Parameter(torch.zeros(dim + 1))
        self.step = 1 / max(1, config.depth)

    def potential(self, t: Tensor, z: Tensor) -> Tensor:
        """Compute Φ at z (B, D) and t, 0-d or (B,): (B,)."""
        s = _with_time(t, z)
        _, u = self._forward(s)
        quadratic = (s @ self.low_rank.T).square().sum(dim=1) / 2
        return u @ self.weight + quadratic + s @ self.linear

    def forward(self, t: Tensor, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Compute −∇_z Φ at z (B, D); see :class:`Velocity`."""
        s = _with_time(t, z)
        return -self._gradient(s)[:, : self.dim]

    def derivatives(self, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the gradient and the Laplacian of Φ in closed form.

        The Laplacian costs O(m² D) per layer, as much as a gradient for each coordinate of the
        first layer; no automatic differentiation takes part.

        Args:
            t: time, 0-d or (B,).
            z: samples (B, D).

        Returns:
            ∇_s Φ, (B, D + 1), whose last column is ∂Φ/∂t, and tr ∇_z² Φ, (B,).
        """
        s = _with_time(t, z)
        arguments, _ = self._forward(s)
        adjoints = self._backward(arguments)
        gradient = self._close(s, arguments, adjoints)
        spatial = self.first.weight[:, : self.dim]
        slope = arguments[0].tanh()
        # σ'' = 1 − tanh²; row i of the Jacobian of u is ∂u/∂z_i
        curvature = (1 - slope.square()) * adjoints[0]
        trace = curvature @ spatial.square().sum(dim=1)
        jacobian = slope[:, None, :] * spatial.T
        for layer, argument, adjoint in zip(
            self.layers, arguments[1:], adjoints[1:], strict=True
        ):
            assert isinstance(layer, nn.Linear)
            slope = argument.tanh()
            moved = jacobian @ layer.weight.T
            curvature = (1 - slope.square()) * adjoint
            trace = trace + self.step * (curvature[:, None] * moved.square()).sum(dim=(1, 2))
            jacobian = jacobian + self.step * slope[:, None, :] * moved
        return gradient, trace + self.low_rank[:, : self.dim].square().sum()

    def _forward(self, s: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the arguments of σ in each layer, and the features u_M; (B, m) each."""
        arguments = [self.first(s)]
        features = _sigma(arguments[0])
        for layer in self.layers:
            arguments.append(layer(features))
            features = features + self.step * _sigma(arguments[-1])
        return arguments, features

    def _backward(self, arguments: list[Tensor]) -> list[Tensor]:
        """Return ∂(wᵀu)/∂u after each layer, first layer first; (B, m) each."""
        adjoint = self.weight.expand(len(arguments[0]), -1)
        adjoints = [adjoint]
        for layer, argument in zip(reversed(self.layers), reversed(arguments[1:]), strict=True):
            assert isinstance(layer, nn.Linear)
            adjoint = adjoint + self.step * (argument.tanh() * adjoint) @ layer.weight
            adjoints.append(adjoint)
        return adjoints[::-1]

    def _close(self, s: Tensor, arguments: list[Tensor], adjoints: list[Tensor]) -> Tensor:
        """Return ∇_s Φ, (B, D + 1)."""
        residual = (arguments[0].tanh() * adjoints[0]) @ self.first.weight
        return residual + (s @ self.low_rank.T) @ self.low_rank + self.linear

    def _gradient(self, s: Tensor) -> Tensor:
        arguments, _ = self._forward(s)
        return self._close(s, arguments, self._backward(arguments))


class PotentialCosts(Divergence):
    """The exact ∇·v = −tr ∇²Φ, with the running costs of OT-Flow.

    The costs are ½‖v‖² and |∂Φ/∂t − ½‖∇_z Φ‖²|. The second is the violation of the
    Hamilton–Jacobi–Bellman equation of optimal transport.

    Args:
        costs: 2, or 0 to leave them out; likelihoods need ∇·v alone.
    """

    def __init__(self, costs: int = 2) -> None:
        self.costs = costs

    def estimates(
        self, velocity: Velocity, t: Tensor, z: Tensor, eps: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute v (B, D) and the rows (3, B) or (1, B); see :class:`Divergence`."""
        assert isinstance(velocity, PotentialVelocity)
        gradient, laplacian = velocity.derivatives(t, z)
        v = -gradient[:, :-1]
        if not self.costs:
            return v, -laplacian[None]
        energy = v.square().sum(dim=1) / 2
        return v, torch.stack([-laplacian, energy, (gradient[:, -1] - energy).abs()])


class OtFlow(FlowModel):
    """A neural ODE along the gradient of a potential, with a penalty on the transport cost.

        loss = E[ −log N(z_1; 0, I) − ∫∇·v dt + α_L ∫½‖v‖² dt + α_R ∫|∂_t Φ − ½‖∇Φ‖²| dt ]

    The weights are divided by that of the likelihood, which is 100 in the authors' code.

    Args:
        config: the configuration.
        dim: D.
        generator: source of the initial weights.

    Reference: Onken, Wu Fung, Li, Ruthotto, "OT-Flow" (AAAI 2021); weights of its code.
    """

    def __init__(
        self, config: OtFlowConfig, dim: int, generator: torch.Generator | None = None
    ) -> None:
        with initial_weights(generator):
            velocity = PotentialVelocity(config, dim)
        super().__init__(flow_of(dim, [Block(velocity, config.solver)]))
        self.config = config

    @property
    def divergence(self) -> Divergence:
        """Return the closed form of ∇·v."""
        return PotentialCosts(costs=0)

    def loss(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Compute the objective of a batch z (B, D), a scalar in nats.

        Raises:
            SolveError: the ODE cannot be solved.
        """
        moved = self.flow[0].transport(z, divergence=PotentialCosts())
        assert moved.log_det is not None and moved.costs is not None
        energy, violation = moved.costs
        costs = self.config.transport * energy + self.config.hjb * violation
        return (costs - log_normal(moved.z) - moved.log_det).mean()


def _sigma(x: Tensor) -> Tensor:
    """Compute log(eˣ + e⁻ˣ) without overflow; its derivative is tanh."""
    return x.abs() + F.softplus(-2 * x.abs())


def _with_time(t: Tensor, z: Tensor) -> Tensor:
    """Return (z, t), (B, D + 1)."""
    return torch.cat([z, t.expand(len(z))[:, None].to(z)], dim=1)
