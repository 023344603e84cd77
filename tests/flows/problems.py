"""Velocity fields that carry their exact solution, for every test of the flows.

A problem knows T(z) = z(1), log |det ∂T/∂z| and ∇·v, so that tests compare with mathematics and
not with another run of the code.
"""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flows.block import Block
from flows.flow import Flow
from flows.networks.base import Velocity
from flows.objectives.losses import matching_loss, ou_target
from flows.solving.solver import SolverConfig
from flows.spec import BlockSpec, build_block

Field = Callable[[Tensor, Tensor], Tensor]


class Problem(Velocity):
    """A velocity with its exact flow."""

    @abstractmethod
    def exact(self, z: Tensor) -> Tensor:
        """T(z), (B, D)."""

    @abstractmethod
    def exact_log_det(self, z: Tensor) -> Tensor:
        """log |det ∂T/∂z|, (B,)."""

    @abstractmethod
    def exact_divergence(self, t: float, z: Tensor) -> Tensor:
        """∇·v(t, z), (B,)."""


class Affine(Problem):
    """v = A z + b: T(z) = e^A z + ∫₀¹ e^{sA} b ds, log det = tr A."""

    def __init__(self, matrix: Tensor, offset: Tensor) -> None:
        super().__init__((len(offset),))
        self.matrix = nn.Parameter(matrix.clone())
        self.offset = nn.Parameter(offset.clone())

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return z @ self.matrix.T + self.offset

    def exact(self, z: Tensor) -> Tensor:
        dim = self.dim
        joint = torch.zeros(dim + 1, dim + 1, dtype=z.dtype)
        joint[:dim, :dim], joint[:dim, dim] = self.matrix.detach(), self.offset.detach()
        flow = torch.linalg.matrix_exp(joint)
        return z @ flow[:dim, :dim].T + flow[:dim, dim]

    def exact_log_det(self, z: Tensor) -> Tensor:
        return self.matrix.detach().trace().expand(len(z))

    def exact_divergence(self, t: float, z: Tensor) -> Tensor:
        return self.exact_log_det(z)


class Rotation(Problem):
    """A quarter turn in the plane: volume is kept."""

    def __init__(self) -> None:
        super().__init__((2,))
        self.rate = nn.Parameter(torch.tensor(math.pi / 2, dtype=torch.float64))

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.rate * torch.stack([-z[:, 1], z[:, 0]], dim=1)

    def exact(self, z: Tensor) -> Tensor:
        return torch.stack([-z[:, 1], z[:, 0]], dim=1)

    def exact_log_det(self, z: Tensor) -> Tensor:
        return z.new_zeros(len(z))

    def exact_divergence(self, t: float, z: Tensor) -> Tensor:
        return z.new_zeros(len(z))


class Cubic(Problem):
    """v = −z³/2, coordinate by coordinate: T(z) = z / √(1 + z²)."""

    def __init__(self, dim: int = 3) -> None:
        super().__init__((dim,))
        self.rate = nn.Parameter(torch.tensor(-0.5, dtype=torch.float64))

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.rate * z**3

    def exact(self, z: Tensor) -> Tensor:
        return z / (1 + z**2).sqrt()

    def exact_log_det(self, z: Tensor) -> Tensor:
        return -1.5 * (1 + z**2).log().sum(dim=1)

    def exact_divergence(self, t: float, z: Tensor) -> Tensor:
        return -1.5 * z.square().sum(dim=1)


class Tangent(Problem):
    """v = (1 + z²)/4: T(z) = tan(arctan z + ¼), a flow with clean asymptotic errors."""

    def __init__(self, dim: int = 2) -> None:
        super().__init__((dim,))
        self.rate = nn.Parameter(torch.tensor(0.25, dtype=torch.float64))

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.rate * (1 + z**2)

    def exact(self, z: Tensor) -> Tensor:
        return torch.tan(torch.atan(z) + 0.25)

    def exact_log_det(self, z: Tensor) -> Tensor:
        return ((1 + self.exact(z) ** 2) / (1 + z**2)).log().sum(dim=1)

    def exact_divergence(self, t: float, z: Tensor) -> Tensor:
        return z.sum(dim=1) / 2


class Breathing(Problem):
    """v = 2 cos(3t) z, which depends on the time: T(z) = exp(⅔ sin 3) z."""

    def __init__(self, dim: int = 2) -> None:
        super().__init__((dim,))
        self.rate = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.rate * torch.cos(3 * t) * z

    def exact(self, z: Tensor) -> Tensor:
        return math.exp(2 / 3 * math.sin(3)) * z

    def exact_log_det(self, z: Tensor) -> Tensor:
        return z.new_full((len(z),), self.dim * 2 / 3 * math.sin(3))

    def exact_divergence(self, t: float, z: Tensor) -> Tensor:
        return z.new_full((len(z),), self.dim * 2 * math.cos(3 * t))


class Coupled(Velocity):
    """v = M tanh(W z) + sin(t) z on any shape: every coordinate acts on every other one.

    ∇·v = Σ_j (W M)_jj (1 − tanh²(W z)_j) + D sin t; no closed-form flow.
    """

    def __init__(self, shape: tuple[int, ...], seed: int = 0) -> None:
        super().__init__(shape)
        generator = torch.Generator().manual_seed(seed)
        size = (self.dim, self.dim)
        mix = torch.randn(2, *size, generator=generator, dtype=torch.float64)
        self.inner = nn.Parameter(mix[0] / self.dim**0.5)
        self.outer = nn.Parameter(mix[1] / self.dim**0.5)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        flat = z.flatten(1)
        mixed = torch.tanh(flat @ self.inner.T) @ self.outer.T
        return (mixed + torch.sin(t).view(-1, 1) * flat).view_as(z)

    def jacobian(self, t: float, z: Tensor) -> Tensor:
        """∂v/∂z, (B, D, D)."""
        slope = 1 - torch.tanh(z.flatten(1) @ self.inner.T).square()
        outer, inner = self.outer.detach(), self.inner.detach()
        core = torch.einsum("ij,bj,jk->bik", outer, slope.detach(), inner)
        return core + math.sin(t) * torch.eye(self.dim, dtype=z.dtype)

    def exact_divergence(self, t: float, z: Tensor) -> Tensor:
        return self.jacobian(t, z).diagonal(dim1=1, dim2=2).sum(dim=1)


class Formula(Velocity):
    """v given by a function, for fields that must fail."""

    def __init__(self, field: Field, dim: int = 2) -> None:
        super().__init__((dim,))
        self.field = field

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.field(t, z)


def affine(dim: int = 3, seed: int = 0) -> Affine:
    """A well-conditioned, non-symmetric affine field."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(dim, dim, generator=generator, dtype=torch.float64) / dim**0.5
    return Affine(matrix, torch.randn(dim, generator=generator, dtype=torch.float64))


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "affine": affine,
    "rotation": Rotation,
    "cubic": Cubic,
    "tangent": Tangent,
    "breathing": Breathing,
}


def points(problem: Velocity, batch: int = 7, seed: int = 1, scale: float = 0.7) -> Tensor:
    """Float64 samples (batch, *shape)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, *problem.shape)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def fresh_flow(shape: tuple[int, ...], specs: Sequence[BlockSpec], seed: int = 0) -> Flow:
    """A flow of freshly initialised blocks."""
    generator = torch.Generator().manual_seed(seed)
    return Flow.from_blocks(shape, [(spec, build_block(spec, shape, generator)) for spec in specs])


def rebuilt(flow: Flow) -> Flow:
    """The flow as from its files: specifications through JSON, then the weights."""
    plain = json.loads(json.dumps([spec.to_dict() for spec in flow.specs]))
    again = fresh_flow(flow.shape, [BlockSpec.from_dict(spec) for spec in plain]).double()
    again.load_state_dict(flow.state_dict())
    return again


def regression(
    velocity: Velocity, z: Tensor, gamma: float | None, generator: torch.Generator, **options: Any
) -> Tensor:
    """E ‖v(t, I_t) − İ_t‖² with t ~ U(0, 1) and targets of the Ornstein–Uhlenbeck process."""
    noise = torch.randn(z.shape, generator=generator, dtype=z.dtype)
    t = torch.rand(z.shape[0], generator=generator, dtype=z.dtype)
    return matching_loss(velocity, z, ou_target(z, gamma, noise), t, **options).total


def block_of(velocity: Velocity, method: str = "rk4", steps: int = 2, **options: object) -> Block:
    """A block around a field."""
    return Block(velocity, SolverConfig(method=method, steps=steps, **options))
