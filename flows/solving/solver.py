"""The settings of a block's ODE solver."""

from __future__ import annotations

from dataclasses import dataclass

from flows.errors import FlowError

#: methods on a fixed grid and their evaluations per step (torchdiffeq's rk4 is the 3/8 rule)
FIXED_METHODS = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}
#: stages of a step whose slope has weight 0 in the method's sum (heun3: 1/4, 0, 3/4)
UNWEIGHTED_STAGES = {"midpoint": (0,), "heun3": (1,)}
ADAPTIVE_METHODS = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")


@dataclass(frozen=True)
class SolverConfig:
    """The ODE solver of a block.

    Attributes:
        method: ``euler`` | ``midpoint`` | ``heun2`` | ``heun3`` | ``rk4`` on a fixed grid, or the
            adaptive ``dopri5`` | ``dopri8`` | ``bosh3`` | ``fehlberg2`` | ``adaptive_heun``.
        steps: sub-intervals S of a fixed grid, at least 1; several networks in a block need a
            multiple of their number.
        rtol: relative tolerance of an adaptive method; at least 16 rounding units are used.
        atol: absolute tolerance of an adaptive method, likewise.
        adjoint: whether gradients come from the adjoint equation, whose memory does not grow with
            the steps, instead of backpropagation.
        max_evaluations: evaluations of the right-hand side after which a solve fails.
        blow_up: largest coordinate of a sample or a velocity beyond which a solve fails. Latents
            are standardised, so the samples of a working flow stay below a hundred.

    Raises:
        FlowError: the method is unknown, or a value is out of range.
    """

    method: str = "rk4"
    steps: int = 2
    rtol: float = 1e-5
    atol: float = 1e-5
    adjoint: bool = False
    max_evaluations: int = 2000
    blow_up: float = 1e6

    def __post_init__(self) -> None:
        """Check the method and the ranges."""
        if self.method not in FIXED_METHODS and self.method not in ADAPTIVE_METHODS:
            known = ", ".join([*FIXED_METHODS, *ADAPTIVE_METHODS])
            raise FlowError(f"unknown solver {self.method!r}; choose one of {known}")
        for name in ("steps", "max_evaluations"):
            if getattr(self, name) < 1:
                raise FlowError(f"{name} is {getattr(self, name)}; expected at least 1")
        for name in ("rtol", "atol", "blow_up"):
            if not 0 < getattr(self, name) < float("inf"):
                raise FlowError(f"{name} is {getattr(self, name)}; expected a positive value")
        needed = 0 if self.adaptive else FIXED_METHODS[self.method] * self.steps
        if needed > self.max_evaluations:
            raise FlowError(
                f"steps={self.steps} of {self.method} takes {needed} evaluations; "
                f"expected at most {self.max_evaluations}; take fewer steps"
            )

    @property
    def adaptive(self) -> bool:
        """Return whether the method chooses its own steps."""
        return self.method in ADAPTIVE_METHODS

    @property
    def allows_probes_per_evaluation(self) -> bool:
        """Return whether each evaluation may have its own probes of a random divergence."""
        return not (self.adaptive or self.adjoint)

    def weights_divergence(self, evaluation: int) -> bool:
        """Return whether the divergence at an evaluation has a weight in the log-det.

        The adjoint method differentiates every evaluation, so that it needs all of them.

        Args:
            evaluation: its number in the solve, from 0.
        """
        if self.adjoint or self.method not in UNWEIGHTED_STAGES:
            return True
        return evaluation % FIXED_METHODS[self.method] not in UNWEIGHTED_STAGES[self.method]
