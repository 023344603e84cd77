"""One neural-ODE block: its map T(z) = z(1) and the change of log-density.

    dz/dt = v(t, z),  z(0) = z,   log_det = ∫₀¹ ∇·v(t, z(t)) dt

Time 0 is the data side, time 1 the noise side.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from flows.errors import FlowError
from flows.networks.base import Velocity
from flows.networks.condition import Condition, bind
from flows.solving.divergence import Divergence, Probes
from flows.solving.integration import Integrator, make_segments
from flows.solving.solver import SolverConfig


@dataclass(frozen=True)
class Transport:
    """The result of one pass through a block: samples (B, *shape) at its other end.

    Attributes:
        log_det: log |det ∂z(end)/∂z(start)| in nats, (B,), for the direction of the pass; None
            without a divergence estimator.
        log_det_probes: the estimates (n, B) by each of n probes, whose mean is ``log_det``.
        costs: integrals (m, B) of the m running costs that the estimator adds.
        nfe: evaluations of the right-hand side.
    """

    z: Tensor
    log_det: Tensor | None
    log_det_probes: Tensor | None
    costs: Tensor | None
    nfe: int


class Block(nn.Module):
    """A velocity field and the solver that integrates it in training, and where no other is given.

    Raises:
        FlowError: a sub-interval of the fixed grid crosses a jump of the field.
    """

    def __init__(self, velocity: Velocity, solver: SolverConfig | None = None) -> None:
        super().__init__()
        self.velocity = velocity
        self.solver = SolverConfig() if solver is None else solver
        make_segments(velocity, self.solver)  # raises early

    def forward(self, z: Tensor, condition: Condition | None = None) -> Tensor:
        """Compute T(z) = z(1), (B, *shape); see :meth:`transport`."""
        return self.transport(z, condition=condition).z

    def transport(
        self,
        z: Tensor,
        reverse: bool = False,
        divergence: Divergence | None = None,
        eps: Tensor | Probes | None = None,
        solver: SolverConfig | None = None,
        condition: Condition | None = None,
    ) -> Transport:
        """Transport samples (B, *shape) through the block, differentiably; ``reverse`` goes back.

        With a divergence estimator the log-det of the map is +∫₀¹ ∇·v dt forwards, −∫₀¹ ∇·v dt in
        reverse. Its probes ``eps`` (n, B, *shape) are from ``divergence.draw_probe``; or those of
        each evaluation, on a fixed grid without the adjoint method. ``solver`` overrides the
        block's own.

        Raises:
            FlowError: z has another shape than the velocity's samples, the probes are missing, the
                condition does not fit, or a sub-interval crosses a jump of the field.
            SolveError: the field is not finite, blows up, or needs too many evaluations.
        """
        solver = solver or self.solver
        if tuple(z.shape[1:]) != self.velocity.shape or z.shape[0] < 1:
            raise FlowError(
                f"the block takes samples (B, {', '.join(map(str, self.velocity.shape))}) with "
                f"B ≥ 1, found {tuple(z.shape)}"
            )
        field = bind(self.velocity, condition, z)
        segments = make_segments(field, solver)
        end, integrals, nfe = Integrator(segments, reverse, divergence, eps, solver).solve(z)
        if integrals is None or divergence is None:
            return Transport(end, None, None, None, nfe)
        probes, costs = integrals[: divergence.probes], integrals[divergence.probes :]
        log_det = probes[0] if probes.shape[0] == 1 else probes.mean(dim=0)
        return Transport(end, log_det, probes, costs, nfe)
