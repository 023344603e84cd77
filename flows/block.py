"""One neural-ODE block: z(0) → z(1) along its velocity, with the change of log-density.

    dz/dt = v(t, z),   log_det = ∫ ∇·v(t, z(t)) dt

integrated by torchdiffeq. Time 0 is the data side, time 1 the noise side.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from flows.errors import FlowError
from flows.networks.base import Velocity
from flows.networks.condition import Condition, bind
from flows.solving.divergence import Divergence
from flows.solving.solver import ADAPTIVE_METHODS, FIXED_METHODS, SolverConfig, Way, legs

__all__ = ["ADAPTIVE_METHODS", "FIXED_METHODS", "Block", "SolverConfig", "Transport"]


@dataclass(frozen=True)
class Transport:
    """What one pass through a block gives.

    Attributes:
        z: (B, *shape), at the other end of the block.
        log_det: (B,), log |det ∂z(end)/∂z(start)| in nats for the direction travelled; None if no
            divergence was asked for.
        log_det_probes: (n, B), the same by each probe alone; ``log_det`` is their mean.
        nfe: evaluations of the right-hand side.
    """

    z: Tensor
    log_det: Tensor | None
    log_det_probes: Tensor | None
    nfe: int


class Block(nn.Module):
    """A velocity field and the solver that follows it.

    Args:
        velocity: the field v(t, z); where it jumps, the solver starts anew.
        solver: the grid used for training, and elsewhere unless overridden.

    Raises:
        FlowError: the grid does not meet the field's jumps.
    """

    def __init__(self, velocity: Velocity, solver: SolverConfig | None = None) -> None:
        super().__init__()
        self.velocity = velocity
        self.solver = SolverConfig() if solver is None else solver
        legs(velocity, self.solver)

    def forward(self, z: Tensor, condition: Condition | None = None) -> Tensor:
        """T(z) = z(1), (B, *shape)."""
        return self.transport(z, condition=condition).z

    def transport(
        self,
        z: Tensor,
        reverse: bool = False,
        divergence: Divergence | None = None,
        eps: Tensor | None = None,
        solver: SolverConfig | None = None,
        condition: Condition | None = None,
    ) -> Transport:
        """Carries samples through the block, differentiably.

        Args:
            z: (B, *shape), at t = 0, or at t = 1 with ``reverse``.
            reverse: travel from 1 to 0; the inverse map.
            divergence: estimator of ∇·v; None skips the log-det.
            eps: probe of a random estimator, ``divergence.draw_probe(z, generator)``.
            solver: overrides the block's own.
            condition: classes of the samples, images beside them, for a velocity told of either.

        Returns:
            the samples at the other end and, with a divergence, log |det| of the map travelled:
            +∫₀¹ ∇·v dt forwards, −∫₀¹ ∇·v dt backwards.

        Raises:
            FlowError: z has another shape than the velocity's samples, the probe is missing, the
                condition does not fit, or the grid does not meet the field's jumps.
            SolveError: the field is not finite, blows up, or needs too many evaluations.
        """
        solver = solver or self.solver
        if tuple(z.shape[1:]) != self.velocity.shape or z.shape[0] < 1:
            raise FlowError(
                f"the block takes samples (B, {', '.join(map(str, self.velocity.shape))}) with "
                f"B ≥ 1, found {tuple(z.shape)}"
            )
        field = bind(self.velocity, condition, z)
        way = Way(legs(field, solver), reverse, divergence, eps, solver)
        end, probes, nfe = way.follow(z)
        if probes is None:
            return Transport(end, None, None, nfe)
        log_det = probes[0] if probes.shape[0] == 1 else probes.mean(dim=0)
        return Transport(end, log_det, probes, nfe)
