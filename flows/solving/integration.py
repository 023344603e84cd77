"""The numerical solution of a block's ODE by torchdiffeq.

A field that jumps in time is solved segment by segment, so that no step and no error estimate
crosses a jump.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchdiffeq import odeint, odeint_adjoint

from flows.errors import FlowError, SolveError
from flows.networks.base import SmoothPiece, Velocity
from flows.networks.piecewise import split_steps
from flows.solving.divergence import Divergence, Probes
from flows.solving.solver import SolverConfig

#: the samples (B, *shape) and, with a divergence, its integrals (n, B)
State = tuple[Tensor, ...]


@dataclass(frozen=True)
class Segment:
    """A smooth piece of a field, with the number of sub-intervals of a fixed grid on it."""

    piece: SmoothPiece
    steps: int


def make_segments(velocity: Velocity, solver: SolverConfig) -> tuple[Segment, ...]:
    """Divide a field into the segments that are solved one after another, in the order of time.

    Raises:
        FlowError: a sub-interval of the fixed grid crosses a jump of the field.
    """
    pieces = velocity.smooth_pieces()
    if solver.adaptive:
        return tuple(Segment(piece, 1) for piece in pieces)
    steps = split_steps(pieces, solver.steps)
    return tuple(Segment(piece, count) for piece, count in zip(pieces, steps, strict=True))


class Integrator:
    """The integration of one pass of samples through a block.

    Args:
        segments: the segments of the field, in the order of time.
        reverse: whether to go from t = 1 to t = 0.
        divergence: estimator of ∇·v; None solves for the samples alone.
        eps: the estimator's probes (n, B, *shape), held through the solve, or those of each
            evaluation.
        solver: the settings.

    Raises:
        FlowError: each evaluation has its own probes, but the solver needs held ones.

    Attributes:
        check_evaluations: whether every evaluation is checked. An adaptive solver must, because it
            would reduce its step for ever on a field that is not finite. A fixed grid checks its
            end, and repeats a failed solve with checks to find the time of the failure.
        evaluations: evaluations of the right-hand side so far.
        t: time of the latest evaluation.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        reverse: bool,
        divergence: Divergence | None,
        eps: Tensor | Probes | None,
        solver: SolverConfig,
    ) -> None:
        if callable(eps) and not solver.allows_probes_per_evaluation:
            raise FlowError(
                "an adaptive solver or the adjoint method needs probes that are held through the "
                "solve, found one for each evaluation; draw them with draw_probe(z, generator)"
            )
        self.segments = segments[::-1] if reverse else segments
        self.reverse = reverse
        self.divergence = divergence
        self.eps = eps
        self.solver = solver
        self.check_evaluations = solver.adaptive
        self.evaluations = 0
        self.t: Tensor | float = 0.0

    def solve(self, z: Tensor) -> tuple[Tensor, Tensor | None, int]:
        """Integrate the ODE from one end of the block to the other.

        Args:
            z: samples (B, *shape) at the start.

        Returns:
            the samples (B, *shape) at the end; the integrals of the rows of the divergence
            estimator (n + m, B), or None without one; the evaluations of the right-hand side.

        Raises:
            SolveError: the field is not finite, blows up, or needs too many evaluations.
        """
        end = self._integrate(z)
        nfe, self.evaluations = self.evaluations, 0  # the adjoint solve is counted afresh
        if not self._is_sound(end):
            self._locate_failure(z)
        return end[0], (end[1] if len(end) == 2 else None), nfe

    def _integrate(self, z: Tensor) -> State:
        state: State = (z,)
        if self.divergence is not None:
            rows = self.divergence.probes + self.divergence.costs
            state = (z, z.new_zeros(rows, z.shape[0]))
        for segment in self.segments:
            state = self._solve_segment(segment, state)
        return state

    def _solve_segment(self, segment: Segment, state: State) -> State:
        """Integrate over one segment; returns the state at its end."""
        solver, piece, z = self.solver, segment.piece, state[0]
        ends = [piece.end, piece.start] if self.reverse else [piece.start, piece.end]
        times = z.new_tensor(ends)
        # An adaptive method never meets a tolerance below the rounding error.
        finest = 16 * torch.finfo(z.dtype).eps
        settings = {
            "rtol": max(solver.rtol, finest),
            "atol": max(solver.atol, finest),
            "method": solver.method,
            "options": self._options(segment, times),
        }
        rate = _RightHandSide(self, piece.field)
        try:
            if solver.adjoint and torch.is_grad_enabled():
                back = times.flip(0)
                path = odeint_adjoint(
                    rate,
                    state,
                    times,
                    adjoint_params=tuple(piece.field.parameters()),
                    # torchdiffeq replaces t by −t where times decrease, in the adjoint solve, too.
                    adjoint_options=self._options(segment, -back if self.reverse else back),
                    **settings,
                )
            else:
                path = odeint(rate, state, times, **settings)
        except AssertionError as failure:  # torchdiffeq's own checks, absent under python -O
            raise self.failure(str(failure) or "the solver gave up") from failure
        return tuple(component[-1] for component in path)

    def _options(self, segment: Segment, times: Tensor) -> dict[str, object]:
        """Return torchdiffeq's options: exactly S sub-intervals, or steps that stop at the end.

        Its ``step_size`` takes the ceiling of a rounded quotient, so it may add a sub-interval.
        Its adaptive solvers step past the end, where no field has been trained, and interpolate
        back. They keep the time in float64 on a CPU, and in the samples' dtype on other devices,
        of which MPS has no float64.
        """
        if self.solver.adaptive:
            here = {} if times.device.type == "cpu" else {"dtype": times.dtype}
            return {"step_t": times[-1:], **here}

        def nodes(_rate: object, _state: Tensor, t: Tensor) -> Tensor:
            start, end = float(t[0]), float(t[-1])
            return torch.linspace(start, end, segment.steps + 1, dtype=t.dtype, device=t.device)

        return {"grid_constructor": nodes}

    def _is_sound(self, state: State) -> bool:
        """Return whether the state is finite and within ``blow_up``."""
        with torch.no_grad():  # a single transfer from the device
            sound = state[0].abs().amax() <= self.solver.blow_up  # False for NaN
            if len(state) == 2:
                sound = sound & state[1].isfinite().all()
            return bool(sound)

    def _locate_failure(self, z: Tensor) -> None:
        """Repeat a failed solve from z (B, *shape) with checks, and raise at the first failure."""
        self.check_evaluations = True
        with torch.no_grad():
            self._integrate(z.detach())
        self.t = 0.0 if self.reverse else 1.0
        raise self.failure(
            f"the end state is not finite, or a coordinate exceeds {self.solver.blow_up:.3g}"
        )

    def failure(self, reason: str) -> SolveError:
        """Return the error of a failure at the time of the latest evaluation."""
        t = self.t.detach() if isinstance(self.t, Tensor) else self.t  # adjoint times need grad
        return SolveError(reason, float(t), evaluations=self.evaluations)


class _RightHandSide:
    """The right-hand side of the ODE; it counts its evaluations and may check them.

    The state is (z,) with z (B, *shape), or (z, log_det) with log_det (n, B).
    """

    def __init__(self, integrator: Integrator, velocity: Velocity) -> None:
        self.integrator = integrator
        self.velocity = velocity

    def __call__(self, t: Tensor, state: State) -> State:
        integrator = self.integrator
        allowed = integrator.solver.max_evaluations
        integrator.t = t
        if integrator.evaluations >= allowed:
            raise integrator.failure(
                f"the solver needs more than {allowed} evaluations, its limit, because the field "
                "is stiff or blows up; train with a smaller learning rate or step h, or solve on "
                "a fixed grid"
            )
        integrator.evaluations += 1
        z = state[0]
        if integrator.check_evaluations:
            self._check("the state", z)
        rate: State
        if integrator.divergence is None:
            rate = (self.velocity(t, z),)
        elif not integrator.solver.weights_divergence(integrator.evaluations - 1):
            rate = (self.velocity(t, z), torch.zeros_like(state[1]))
        else:
            eps = integrator.eps
            probes = eps(integrator.evaluations - 1) if callable(eps) else eps
            rate = integrator.divergence.estimates(self.velocity, t, z, probes)
        if integrator.check_evaluations:
            self._check("the velocity", rate[0])
            if len(rate) == 2 and not bool(rate[1].isfinite().all()):
                raise integrator.failure("the divergence is not finite")
        return rate

    def _check(self, name: str, x: Tensor) -> None:
        """Raise SolveError if x (B, *shape) has NaN or a coordinate beyond ``blow_up``."""
        largest, limit = float(x.detach().abs().amax()), self.integrator.solver.blow_up
        if largest != largest:
            raise self.integrator.failure(f"{name} is NaN")
        if largest > limit:
            raise self.integrator.failure(
                f"{name} blows up: a coordinate reaches {largest:.3g}; expected at most "
                f"{limit:.3g}"
            )
