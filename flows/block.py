"""One neural-ODE block: z(0) → z(1) along its velocity, with the change of log-density.

    dz/dt = v(t, z),   log_det = ∫ ∇·v(t, z(t)) dt

integrated by torchdiffeq. Time 0 is the data side, time 1 the noise side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchdiffeq import odeint, odeint_adjoint

from flows.divergence import Divergence
from flows.errors import FlowError, SolveError
from flows.velocity_base import Velocity

#: fixed-grid methods and their evaluations a step (torchdiffeq's rk4 is the 3/8 rule)
FIXED_METHODS = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}
ADAPTIVE_METHODS = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")


@dataclass(frozen=True)
class SolverConfig:
    """How a block's ODE is integrated.

    Attributes:
        method: ``euler`` | ``midpoint`` | ``heun2`` | ``heun3`` | ``rk4`` on a fixed grid, or
            ``dopri5`` | ``dopri8`` | ``bosh3`` | ``fehlberg2`` | ``adaptive_heun``.
        steps: sub-intervals S of a fixed grid; at least 1.
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

    @property
    def adaptive(self) -> bool:
        """Whether the method chooses its own steps."""
        return self.method in ADAPTIVE_METHODS


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
        velocity: the field v(t, z).
        solver: the grid used for training, and elsewhere unless overridden.
    """

    def __init__(self, velocity: Velocity, solver: SolverConfig | None = None) -> None:
        super().__init__()
        self.velocity = velocity
        self.solver = SolverConfig() if solver is None else solver

    def forward(self, z: Tensor) -> Tensor:
        """T(z) = z(1), (B, *shape)."""
        return self.transport(z).z

    def transport(
        self,
        z: Tensor,
        reverse: bool = False,
        divergence: Divergence | None = None,
        eps: Tensor | None = None,
        solver: SolverConfig | None = None,
    ) -> Transport:
        """Carries samples through the block, differentiably.

        Args:
            z: (B, *shape), at t = 0, or at t = 1 with ``reverse``.
            reverse: travel from 1 to 0; the inverse map.
            divergence: estimator of ∇·v; None skips the log-det.
            eps: probe of a random estimator, ``divergence.draw_probe(z, generator)``.
            solver: overrides the block's own.

        Returns:
            the samples at the other end and, with a divergence, log |det| of the map travelled:
            +∫₀¹ ∇·v dt forwards, −∫₀¹ ∇·v dt backwards.

        Raises:
            FlowError: z has another shape than the velocity's samples, or the probe is missing.
            SolveError: the field is not finite, blows up, or needs too many evaluations.
        """
        solver = solver or self.solver
        if tuple(z.shape[1:]) != self.velocity.shape or z.shape[0] < 1:
            raise FlowError(
                f"the block takes samples (B, {', '.join(map(str, self.velocity.shape))}) with "
                f"B ≥ 1, found {tuple(z.shape)}"
            )
        field = _Field(self.velocity, divergence, eps, solver, watch=solver.adaptive)
        end = _integrate(field, z, reverse, solver)
        nfe, field.evaluations = field.evaluations, 0  # the adjoint pass gets its own allowance
        if not _sound(end, solver.blow_up):
            _diagnose(field, z, reverse, solver)
        if divergence is None:
            return Transport(end[0], None, None, nfe)
        probes = end[1]
        log_det = probes[0] if probes.shape[0] == 1 else probes.mean(dim=0)
        return Transport(end[0], log_det, probes, nfe)


class _Field:
    """The right-hand side that torchdiffeq sees; counts, and on demand watches, its evaluations.

    The state is (z,) or (z, log_det (n, B)).
    """

    def __init__(
        self,
        velocity: Velocity,
        divergence: Divergence | None,
        eps: Tensor | None,
        solver: SolverConfig,
        watch: bool,
    ) -> None:
        self.velocity = velocity
        self.divergence = divergence
        self.eps = eps
        self.solver = solver
        self.watch = watch
        self.evaluations = 0
        self.t: Tensor | float = 0.0

    def __call__(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.t = t
        if self.evaluations >= self.solver.max_evaluations:
            raise self.error(
                f"more than {self.solver.max_evaluations} evaluations were needed; the field is "
                "stiff or blows up (train with a smaller learning rate or step h, loosen the "
                "tolerances, or raise solver.max_evaluations)"
            )
        self.evaluations += 1
        z = state[0]
        if self.watch:
            self._watch("the state", z)
        rate: tuple[Tensor, ...]
        if self.divergence is None:
            rate = (self.velocity(t, z),)
        else:
            rate = self.divergence.estimates(self.velocity, t, z, self.eps)
        if self.watch:
            self._watch("the velocity", rate[0])
            if len(rate) == 2 and not bool(rate[1].isfinite().all()):
                raise self.error("the divergence is not finite")
        return rate

    def _watch(self, what: str, x: Tensor) -> None:
        largest = float(x.detach().abs().amax())
        if largest != largest:
            raise self.error(f"{what} is NaN")
        if largest > self.solver.blow_up:
            raise self.error(
                f"{what} blows up: a coordinate reaches {largest:.3g}, more than "
                f"solver.blow_up = {self.solver.blow_up:.3g}"
            )

    def error(self, reason: str) -> SolveError:
        return SolveError(reason, float(self.t), evaluations=self.evaluations)


def _integrate(
    field: _Field, z: Tensor, reverse: bool, solver: SolverConfig
) -> tuple[Tensor, ...]:
    """Solves from one end to the other; returns the state there."""
    times = z.new_tensor([1.0, 0.0] if reverse else [0.0, 1.0])
    state: tuple[Tensor, ...] = (z,)
    if field.divergence is not None:
        state = (z, z.new_zeros(field.divergence.probes, z.shape[0]))
    # A tolerance below the rounding error would be refused for ever.
    finest = 16 * torch.finfo(z.dtype).eps
    settings = {
        "rtol": max(solver.rtol, finest),
        "atol": max(solver.atol, finest),
        "method": solver.method,
        "options": _options(solver, times),
    }
    try:
        if solver.adjoint and torch.is_grad_enabled():
            path = odeint_adjoint(
                field,
                state,
                times,
                adjoint_params=tuple(field.velocity.parameters()),
                adjoint_options=_options(solver, times.flip(0)),
                **settings,
            )
        else:
            path = odeint(field, state, times, **settings)
    except AssertionError as failure:  # torchdiffeq's own checks, absent under python -O
        raise field.error(str(failure) or "the solver gave up") from failure
    return tuple(component[-1] for component in path)


def _options(solver: SolverConfig, times: Tensor) -> dict[str, object]:
    """Solver options: exactly S sub-intervals, or steps that stop at the end of the block.

    torchdiffeq's ``step_size`` takes the ceiling of a rounded quotient, and so may add a
    sub-interval; its adaptive solvers step past the end, where no field has been trained, and
    interpolate back.
    """
    if solver.adaptive:
        return {"step_t": times[-1:]}

    def grid(_field: object, _state: Tensor, t: Tensor) -> Tensor:
        return torch.linspace(
            float(t[0]), float(t[-1]), solver.steps + 1, dtype=t.dtype, device=t.device
        )

    return {"grid_constructor": grid}


def _sound(state: tuple[Tensor, ...], blow_up: float) -> bool:
    """Whether the end state is finite and of a believable size; one transfer from the device."""
    with torch.no_grad():
        sound = state[0].abs().amax() <= blow_up  # False for NaN
        if len(state) == 2:
            sound = sound & state[1].isfinite().all()
        return bool(sound)


def _diagnose(field: _Field, z: Tensor, reverse: bool, solver: SolverConfig) -> None:
    """Repeats a failed fixed-grid solve, watching every evaluation, to name the time."""
    field.watch = True
    with torch.no_grad():
        _integrate(field, z.detach(), reverse, solver)
    field.t = 0.0 if reverse else 1.0
    raise field.error("the end state is not finite or larger than solver.blow_up")
