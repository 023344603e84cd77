"""Step-size schedules, the stopping criterion and the reparameterization of JKO-iFlow.

h_k is the JKO step size of block k, which weights its movement term, and S_k = (E ‖T_k(z) − z‖²)^½
is the distance that the block moves the samples. A free block has no step size and is not in these
lists.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from flows.errors import FlowError


def step_sizes(h0: float, rho: float, h_max: float, blocks: int) -> list[float]:
    """Compute the geometric schedule h_k = min(ρᵏ h₀, h_max), k = 0 … K−1.

    Args:
        h0: first step size h₀, positive.
        rho: growth factor ρ, positive; 1 makes all steps equal.
        h_max: largest step size, positive; infinity sets no limit.
        blocks: number of blocks K ≥ 1.

    Returns:
        K step sizes.

    Raises:
        FlowError: a value is out of range.

    Reference: JKO-iFlow, Algorithm 1; the released 2-D configs use h₀ = 0.25, ρ = 1.4.
    """
    _positive("h0", h0)
    _positive("rho", rho)
    if not h_max > 0:
        raise FlowError(f"h_max must be positive, found {h_max}")
    _at_least_one("blocks", blocks)
    # Logarithms, because ρᵏ overflows for a number of blocks where h_max still applies.
    cap = math.log(h_max) if math.isfinite(h_max) else math.inf
    exponents = [math.log(h0) + k * math.log(rho) for k in range(blocks)]
    if not math.isfinite(h_max) and exponents[-1] > 700:
        raise FlowError(
            f"the last of {blocks} steps overflows; expected finite steps; choose a smaller rho, "
            "fewer blocks or a finite h_max"
        )
    return [h_max if x >= cap else math.exp(x) for x in exponents]


def gammas(gamma1: float, rho: float, blocks: int, free_last: bool = True) -> list[float | None]:
    """Compute the times of local flow matching γ_k = γ₁ ρ^{k−1}, k = 1 … K.

    Args:
        gamma1: Ornstein–Uhlenbeck time γ₁ of the first block, positive.
        rho: growth factor ρ, positive.
        blocks: number of blocks K ≥ 1, with the free one.
        free_last: whether the target of the last block is pure noise.

    Returns:
        K times; the last one is None with ``free_last``.

    Raises:
        FlowError: a value is out of range.

    Reference: Xu, Cheng, Xie, "Local flow matching generative models" (2024).
    """
    _at_least_one("blocks", blocks)
    finite = blocks - 1 if free_last else blocks
    _positive("gamma1", gamma1)
    _positive("rho", rho)
    if finite and math.log(gamma1) + (finite - 1) * math.log(rho) > 700:
        raise FlowError(
            f"the last of {finite} times γ overflows; expected finite times; choose a smaller rho "
            "or fewer blocks"
        )
    times: list[float | None] = list(step_sizes(gamma1, rho, math.inf, finite)) if finite else []
    return [*times, None] if free_last else times


def stopping_ratio(squared_movement: float, squared_norm: float) -> float:
    """Compute the termination ratio Ter(k) = E ‖z − T_k(z)‖² / E ‖T_k(z)‖².

    Training stops when it falls below a tolerance (0.01): the last block hardly moves the samples.

    Args:
        squared_movement: E ‖T_k(z) − z‖², not negative.
        squared_norm: E ‖T_k(z)‖², positive.

    Raises:
        FlowError: a value is out of range or not finite.

    Reference: JKO-iFlow, Algorithm 1.
    """
    if not 0 <= squared_movement < math.inf:
        raise FlowError(f"the squared movement must not be negative, found {squared_movement}")
    _positive("the squared norm", squared_norm)
    return squared_movement / squared_norm


def reparameterize(
    h: Sequence[float], S: Sequence[float], eta: float = 0.5, h_max: float = math.inf
) -> list[float]:
    """Compute step sizes under which the blocks move the samples by more equal distances.

    The points (h₁ + … + h_k, S₁ + … + S_k) define arc length as a piecewise linear function of
    accumulated step size. Let h̃ be the distances between the accumulated step sizes at which the
    arc length is j (S₁ + … + S_K) / K. On an unchanged trajectory the steps h̃ would have equal
    movements. Training changes the trajectory, so the steps are relaxed:

        h ← min(h + η (h̃ − h), h_max)

    Then the blocks are trained again, and the procedure is repeated.

    Args:
        h: K step sizes, positive.
        S: K movements, not negative.
        eta: relaxation η in (0, 1].
        h_max: largest step size, positive.

    Returns:
        K positive step sizes; min(h, h_max) if the movements are equal or all zero.

    Raises:
        FlowError: the lengths differ, or a value is out of range.

    Reference: JKO-iFlow, progressive reparameterization of the trajectory.
    """
    if len(h) != len(S) or not h:
        raise FlowError(
            f"expected one movement for each step, found {len(h)} steps, {len(S)} movements"
        )
    for step in h:
        _positive("h", step)
    for movement in S:
        if not 0 <= movement < math.inf:
            raise FlowError(f"a movement must not be negative, found {movement}")
    if not 0 < eta <= 1:
        raise FlowError(f"eta must lie in (0, 1], found {eta}")
    if not h_max > 0:
        raise FlowError(f"h_max must be positive, found {h_max}")
    steps, movements = np.asarray(h, dtype=np.float64), np.asarray(S, dtype=np.float64)
    length = movements.sum()
    if length == 0:
        return [min(float(step), h_max) for step in steps]
    # A block without movement would make the arc length constant, so that it had no inverse.
    movements = np.maximum(movements, 1e-9 * length)
    arc = np.concatenate([[0.0], np.cumsum(movements)])
    time = np.concatenate([[0.0], np.cumsum(steps)])
    equal = np.linspace(0.0, arc[-1], len(steps) + 1)
    even = np.diff(np.interp(equal, arc, time))
    relaxed = steps + eta * (even - steps)
    return [min(float(step), h_max) for step in relaxed]


def refined_steps(h: Sequence[float], c: int) -> list[float]:
    """Compute the step sizes after every block is split into c children: c times h_k / c each.

    Raises:
        FlowError: c < 1, or a step is not positive.
    """
    _at_least_one("c", c)
    for step in h:
        _positive("h", step)
    return [step / c for step in h for _ in range(c)]


def _positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise FlowError(f"{name} must be positive and finite, found {value}")


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise FlowError(f"{name} must be at least 1, found {value}")
