"""How the ODE of a block is followed: settings, right-hand side, integration, failures.

torchdiffeq does the integrating. A field that jumps (several networks in one block) is followed
piece by piece, so that neither a step nor an error estimate straddles a jump.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchdiffeq import odeint, odeint_adjoint

from flows.errors import FlowError, SolveError
from flows.networks.base import Piece, Velocity
from flows.networks.piecewise import grid
from flows.solving.divergence import Divergence

#: fixed-grid methods and their evaluations a step (torchdiffeq's rk4 is the 3/8 rule)
FIXED_METHODS = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}
ADAPTIVE_METHODS = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")


@dataclass(frozen=True)
class SolverConfig:
    """How a block's ODE is integrated.

    Attributes:
        method: ``euler`` | ``midpoint`` | ``heun2`` | ``heun3`` | ``rk4`` on a fixed grid, or
            ``dopri5`` | ``dopri8`` | ``bosh3`` | ``fehlberg2`` | ``adaptive_heun``.
        steps: sub-intervals S of a fixed grid; at least 1, and a multiple of the networks a block.
        rtol: relative tolerance of an adaptive method, never finer than the number format allows.
        atol: absolute tolerance, likewise.
        adjoint: gradients by the adjoint equation (constant memory) instead of backpropagation.
        max_evaluations: a solve that needs more is given up with a SolveError.
        blow_up: a solve that reaches a coordinate larger than this is given up likewise; latents
            are standardised, so a working flow stays below a hundred.
    """

    method: str = "rk4"
    steps: int = 2
    rtol: float = 1e-5
    atol: float = 1e-5
    adjoint: bool = False
    max_evaluations: int = 2000
    blow_up: float = 1e6

    def __post_init__(self) -> None:
        """Refuses unknown methods and values out of range."""
        if self.method not in FIXED_METHODS and self.method not in ADAPTIVE_METHODS:
            known = ", ".join([*FIXED_METHODS, *ADAPTIVE_METHODS])
            raise FlowError(f"unknown solver {self.method!r}; choose one of {known}")
        for name in ("steps", "max_evaluations"):
            if getattr(self, name) < 1:
                raise FlowError(f"solver.{name} must be at least 1, not {getattr(self, name)}")
        for name in ("rtol", "atol", "blow_up"):
            if not 0 < getattr(self, name) < float("inf"):
                raise FlowError(f"solver.{name} must be positive, found {getattr(self, name)}")
        needed = 0 if self.adaptive else FIXED_METHODS[self.method] * self.steps
        if needed > self.max_evaluations:
            raise FlowError(
                f"solver.steps = {self.steps} of {self.method} take {needed} evaluations, more "
                f"than solver.max_evaluations = {self.max_evaluations}; take fewer, or raise it"
            )

    @property
    def adaptive(self) -> bool:
        """Whether the method chooses its own steps."""
        return self.method in ADAPTIVE_METHODS


@dataclass(frozen=True)
class Leg:
    """A piece of a field, and the sub-intervals that a fixed grid has on it."""

    piece: Piece
    steps: int


def legs(velocity: Velocity, solver: SolverConfig) -> tuple[Leg, ...]:
    """The pieces of a field that are solved one after the other, in the order of time.

    Raises:
        FlowError: the solver's fixed grid does not meet the field's jumps.
    """
    pieces = velocity.pieces()
    if solver.adaptive:
        return tuple(Leg(piece, 1) for piece in pieces)
    shares = grid(pieces, solver.steps)
    return tuple(Leg(piece, share) for piece, share in zip(pieces, shares, strict=True))


class Way:
    """One pass through a block.

    Args:
        way: the legs, in the order of time.
        reverse: go from t = 1 to t = 0.
        divergence: estimator of ∇·v; None follows the samples alone.
        eps: its probe.
        solver: the settings.
    """

    def __init__(
        self,
        way: Sequence[Leg],
        reverse: bool,
        divergence: Divergence | None,
        eps: Tensor | None,
        solver: SolverConfig,
    ) -> None:
        self.legs = way[::-1] if reverse else way
        self.reverse = reverse
        self.divergence = divergence
        self.eps = eps
        self.solver = solver
        self.watch = solver.adaptive
        self.evaluations = 0
        self.t: Tensor | float = 0.0

    def follow(self, z: Tensor) -> tuple[Tensor, Tensor | None, int]:
        """Goes the whole way.

        Args:
            z: samples (B, *shape) at the start.

        Returns:
            the samples at the end; the integral of the divergence by each probe (n, B), None
            without a divergence; evaluations of the right-hand side.

        Raises:
            SolveError: the field is not finite, blows up, or needs too many evaluations.
        """
        end = self._integrate(z)
        nfe, self.evaluations = self.evaluations, 0  # the adjoint pass gets its own allowance
        if not self._sound(end):
            self._diagnose(z)
        return end[0], (end[1] if len(end) == 2 else None), nfe

    def _integrate(self, z: Tensor) -> tuple[Tensor, ...]:
        state: tuple[Tensor, ...] = (z,)
        if self.divergence is not None:
            state = (z, z.new_zeros(self.divergence.probes, z.shape[0]))
        for leg in self.legs:
            state = self._leg(leg, state)
        return state

    def _leg(self, leg: Leg, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Solves one piece; returns the state at its end."""
        solver, piece, z = self.solver, leg.piece, state[0]
        ends = [piece.end, piece.start] if self.reverse else [piece.start, piece.end]
        times = z.new_tensor(ends)
        # A tolerance below the rounding error would be refused for ever.
        finest = 16 * torch.finfo(z.dtype).eps
        settings = {
            "rtol": max(solver.rtol, finest),
            "atol": max(solver.atol, finest),
            "method": solver.method,
            "options": self._options(leg, times),
        }
        field = _Field(self, piece.field)
        try:
            if solver.adjoint and torch.is_grad_enabled():
                back = times.flip(0)
                path = odeint_adjoint(
                    field,
                    state,
                    times,
                    adjoint_params=tuple(piece.field.parameters()),
                    # torchdiffeq counts from 1 to 0 as from −1 to 0, the way back included
                    adjoint_options=self._options(leg, -back if self.reverse else back),
                    **settings,
                )
            else:
                path = odeint(field, state, times, **settings)
        except AssertionError as failure:  # torchdiffeq's own checks, absent under python -O
            raise self.error(str(failure) or "the solver gave up") from failure
        return tuple(component[-1] for component in path)

    def _options(self, leg: Leg, times: Tensor) -> dict[str, object]:
        """Exactly the leg's sub-intervals, or steps that stop at its end.

        torchdiffeq's ``step_size`` takes the ceiling of a rounded quotient, and so may add a
        sub-interval; its adaptive solvers step past the end, where no field has been trained, and
        interpolate back.
        """
        if self.solver.adaptive:
            return {"step_t": times[-1:]}

        def knots(_field: object, _state: Tensor, t: Tensor) -> Tensor:
            start, end = float(t[0]), float(t[-1])
            return torch.linspace(start, end, leg.steps + 1, dtype=t.dtype, device=t.device)

        return {"grid_constructor": knots}

    def _sound(self, state: tuple[Tensor, ...]) -> bool:
        """Whether the state is finite and of a believable size; one transfer from the device."""
        with torch.no_grad():
            sound = state[0].abs().amax() <= self.solver.blow_up  # False for NaN
            if len(state) == 2:
                sound = sound & state[1].isfinite().all()
            return bool(sound)

    def _diagnose(self, z: Tensor) -> None:
        """Repeats a failed fixed-grid solve, watching every evaluation, to name the time."""
        self.watch = True
        with torch.no_grad():
            self._integrate(z.detach())
        self.t = 0.0 if self.reverse else 1.0
        raise self.error("the end state is not finite or larger than solver.blow_up")

    def error(self, reason: str) -> SolveError:
        """A failure at the time of the latest evaluation."""
        at = self.t.detach() if isinstance(self.t, Tensor) else self.t  # adjoint: with a gradient
        return SolveError(reason, float(at), evaluations=self.evaluations)


class _Field:
    """The right-hand side that torchdiffeq sees; counts, and on demand watches, its evaluations.

    The state is (z,) or (z, log_det (n, B)).
    """

    def __init__(self, way: Way, velocity: Velocity) -> None:
        self.way = way
        self.velocity = velocity

    def __call__(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        way, allowed = self.way, self.way.solver.max_evaluations
        way.t = t
        if way.evaluations >= allowed:
            raise way.error(
                f"more than {allowed} evaluations were needed; the field is "
                "stiff or blows up (train with a smaller learning rate or step h, loosen the "
                "tolerances, or raise solver.max_evaluations)"
            )
        way.evaluations += 1
        z = state[0]
        if way.watch:
            self._watch("the state", z)
        rate: tuple[Tensor, ...]
        if way.divergence is None:
            rate = (self.velocity(t, z),)
        else:
            rate = way.divergence.estimates(self.velocity, t, z, way.eps)
        if way.watch:
            self._watch("the velocity", rate[0])
            if len(rate) == 2 and not bool(rate[1].isfinite().all()):
                raise way.error("the divergence is not finite")
        return rate

    def _watch(self, what: str, x: Tensor) -> None:
        largest, limit = float(x.detach().abs().amax()), self.way.solver.blow_up
        if largest != largest:
            raise self.way.error(f"{what} is NaN")
        if largest > limit:
            raise self.way.error(
                f"{what} blows up: a coordinate reaches {largest:.3g}, more than "
                f"solver.blow_up = {limit:.3g}"
            )
