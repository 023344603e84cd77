"""The JKO scheme on Gaussian data, in closed form: what a trained flow must converge to.

If p = N(m, Σ), every JKO step towards N(0, I) is a Gaussian again and its map is affine, with the
eigenvectors of Σ. Along an eigen-direction of variance s² the map a·z minimises

    ½ a² s² − log a + (a − 1)² s² / 2h,

hence a² (1 + h) − a − h / s² = 0. As h → ∞, a → 1/s (the free block); the fixed point is s = 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flows.errors import FlowError


@dataclass(frozen=True)
class GaussianStep:
    """One JKO step T(z) = m' + A (z − m) of Gaussian data.

    Attributes:
        matrix: A, (D, D), symmetric and positive definite.
        mean: of the pushed data, m', (D,).
        covariance: of the pushed data, A Σ A, (D, D).
        squared_movement: E ‖T(z) − z‖², the squared W₂ distance of the step.
        squared_norm: E ‖T(z)‖².
        log_det: log det A in nats, the same for all samples.
        objective: the minimum of E[½‖T‖² − log det] + squared_movement / 2h.
    """

    matrix: Tensor
    mean: Tensor
    covariance: Tensor
    squared_movement: float
    squared_norm: float
    log_det: float
    objective: float

    @property
    def stopping_ratio(self) -> float:
        """Ter(k) = E ‖z − T(z)‖² / E ‖T(z)‖²."""
        return self.squared_movement / self.squared_norm


def jko_scale(variance: Tensor, h: float | None) -> Tensor:
    """The factor a by which one JKO step scales a direction of the given variance.

    a = (1 + √(1 + 4 h (1 + h) / s²)) / (2 (1 + h)), or 1/s for a free block.

    Args:
        variance: s², positive, any shape.
        h: step size, positive; None for the free block.

    Raises:
        FlowError: h or a variance is not positive.
    """
    if not bool((variance > 0).all()):
        raise FlowError("the variances of Gaussian data must be positive")
    if h is None:
        return variance.rsqrt()
    if not 0 < h < math.inf:
        raise FlowError(f"the step size h must be positive and finite, found {h}")
    return (1 + (1 + 4 * h * (1 + h) / variance).sqrt()) / (2 * (1 + h))


def jko_step(mean: Tensor, covariance: Tensor, h: float | None) -> GaussianStep:
    """One exact JKO step from N(mean, covariance) towards N(0, I).

    Args:
        mean: m, (D,); it moves to m / (1 + h).
        covariance: Σ, (D, D), positive definite.
        h: step size; None for the free block.

    Raises:
        FlowError: h is not positive or Σ not positive definite.
    """
    variances, directions = torch.linalg.eigh(covariance)
    scales = jko_scale(variances, h)
    moved_mean = torch.zeros_like(mean) if h is None else mean / (1 + h)
    moved_variances = scales.square() * variances
    movement = float(
        ((scales - 1).square() * variances).sum() + (moved_mean - mean).square().sum()
    )
    norm = float(moved_variances.sum() + moved_mean.square().sum())
    log_det = float(scales.log().sum())
    penalty = 0.0 if h is None else movement / (2 * h)
    return GaussianStep(
        matrix=(directions * scales) @ directions.T,
        mean=moved_mean,
        covariance=(directions * moved_variances) @ directions.T,
        squared_movement=movement,
        squared_norm=norm,
        log_det=log_det,
        objective=norm / 2 - log_det + penalty,
    )


def jko_iterates(
    mean: Tensor, covariance: Tensor, steps: Sequence[float | None]
) -> list[GaussianStep]:
    """The exact JKO steps of a whole schedule, each from where the one before arrived."""
    iterates = []
    for h in steps:
        step = jko_step(mean, covariance, h)
        iterates.append(step)
        mean, covariance = step.mean, step.covariance
    return iterates


def entropy(covariance: Tensor) -> float:
    """Entropy of N(·, Σ) in nats, ½ log det(2πe Σ): the least NLL that a flow can reach."""
    dim = covariance.shape[0]
    return float(torch.linalg.slogdet(covariance)[1] + dim * math.log(2 * math.pi * math.e)) / 2


def kl_to_standard(mean: Tensor, covariance: Tensor) -> float:
    """KL(N(m, Σ) ‖ N(0, I)) in nats, ½ (tr Σ + ‖m‖² − D − log det Σ)."""
    log_det = torch.linalg.slogdet(covariance)[1]
    size = covariance.diagonal().sum() + mean.square().sum()
    return float(size - covariance.shape[0] - log_det) / 2
