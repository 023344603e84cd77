"""Models whose map is a neural ODE: a flow with the interface of the baselines.

JKO-iFlow, local flow matching and flow matching enter a benchmark as :class:`FlowModel`. FFJORD,
OT-Flow and ScoreSDE extend it by a loss.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from flows.baselines.base import Decoded, DensityModel
from flows.block import Block
from flows.flow import Flow
from flows.likelihood import LogProb, log_prob
from flows.solving.divergence import Divergence
from flows.solving.estimators import make_divergence
from flows.solving.solver import SolverConfig

#: solver of likelihoods, codes and samples
SOLVER = SolverConfig(method="dopri5")


class FlowModel(DensityModel):
    """A flow of neural-ODE blocks on vectors.

    Args:
        flow: blocks on samples (D,), or on grids (C, H, W) whose D values form a vector.

    Attributes:
        solver: solver of all maps and likelihoods; training uses the blocks' own.
        probes: random probes that estimate ∇·v in likelihoods; 0 computes it exactly.
    """

    def __init__(self, flow: Flow) -> None:
        super().__init__(flow.dim)
        self.flow = flow
        self.solver = SOLVER
        self.probes = 0

    @property
    def blocks(self) -> int:
        """Return the number of blocks."""
        return len(self.flow)

    @property
    def divergence(self) -> Divergence | str:
        """Return the estimator of ∇·v of likelihoods."""
        return make_divergence("hutchinson", probes=self.probes) if self.probes else "exact"

    def encode(self, z_0: Tensor) -> Tensor:
        """Map data z_0 (n, D) to noise z_K (n, D).

        Raises:
            FlowError: z_0 has another shape.
            SolveError: a block cannot be solved.
        """
        return self.flow.encode(self._grid(z_0), self.solver).flatten(1)

    def decode_checked(self, z_K: Tensor) -> Decoded:
        """Map noise z_K (n, D) to data; an ODE that is solved always has its inverse.

        Raises:
            FlowError: z_K has another shape.
            SolveError: a block cannot be solved.
        """
        moved = self.flow.transport(self._grid(z_K), True, self.solver)
        return Decoded(moved.z.flatten(1), torch.ones(len(z_K), dtype=torch.bool), moved.nfe)

    def log_prob(self, z_0: Tensor, generator: torch.Generator | None = None) -> LogProb:
        """Compute log p(z_0), (n,), for samples (n, D); see :func:`flows.likelihood.log_prob`."""
        z_0 = self._grid(z_0)
        return log_prob(self.flow, z_0, self.divergence, solver=self.solver, generator=generator)

    def _grid(self, z: Tensor) -> Tensor:
        """Return samples (n, D) in the shape of the flow; FlowError for another shape."""
        self.check_samples(z)
        return z.unflatten(1, self.flow.shape)


def flow_of(dim: int, blocks: Iterable[Block]) -> Flow:
    """Join blocks on vectors of length ``dim`` into a flow, data side first.

    The blocks have no specifications, because a baseline keeps its own configuration.
    """
    flow = Flow((dim,))
    flow.blocks.extend(blocks)
    return flow
