"""The objectives that a block minimises: sums over dimensions, means over the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from flows.block import Block
from flows.errors import FlowError
from flows.networks.base import Velocity, optional
from flows.networks.condition import Condition
from flows.solving.divergence import Divergence, Probes

AnyLoss = TypeVar("AnyLoss", bound="JkoLoss | LfmLoss")
INTERPOLANTS = ("linear", "trigonometric")


@dataclass(frozen=True)
class JkoLoss:
    """The terms of the JKO objective: scalar tensors, in nats per sample.

    Attributes:
        total: potential + neg_log_det + movement, the loss to differentiate.
        potential: E ½‖T(z)‖².
        neg_log_det: −E ∫₀¹ ∇·v dt. With a Jacobian penalty λ
            (:class:`flows.solving.estimators.FiniteDifference`) it includes
            + λ E ∫₀¹ ‖∂v/∂z‖_F² dt.
        movement: E ‖T(z) − z‖² / 2h; None for the free block.
        squared_movement: E ‖T(z) − z‖², detached.
        squared_norm: E ‖T(z)‖², detached; :func:`flows.objectives.schedule.stopping_ratio` needs
            both.
        nfe: evaluations of the right-hand side.
        samples: number of samples in the means.
    """

    total: Tensor
    potential: Tensor
    neg_log_det: Tensor
    movement: Tensor | None
    squared_movement: Tensor
    squared_norm: Tensor
    nfe: int
    samples: int

    def per_dim(self, dim: int) -> dict[str, float]:
        """Return the terms divided by D, in nats per dimension, for logs."""
        terms = {
            "total": self.total,
            "potential": self.potential,
            "neg_log_det": self.neg_log_det,
            "movement": self.movement,
        }
        return {
            name: float(term.detach()) / dim for name, term in terms.items() if term is not None
        }


def jko_loss(
    block: Block,
    z: Tensor,
    h: float | None,
    divergence: Divergence,
    eps: Tensor | Probes | None = None,
    labels: Tensor | None = None,
) -> JkoLoss:
    """Compute the objective of one JKO step.

        E[ ½‖T(z)‖² − ∫₀¹ ∇·v dt + (1 / 2h) ‖T(z) − z‖² ]

    Let p be the density of z. Up to a constant, the minimum over T is that of
    KL(T_# p ‖ N(0, I)) + W₂²(p, T_# p) / 2h. With classes, each class makes a JKO step of its own,
    and the objective is the mean over the classes in the batch.

    Args:
        block: the block in training.
        z: samples (B, *shape), transported by the blocks before it.
        h: step size, positive; None for the free block, which has no movement term.
        divergence: estimator of ∇·v.
        eps: the estimator's probes (n, B, *shape), held through the solve, or those of each
            evaluation.
        labels: int64 (B,), for a block with classes.

    Returns:
        the terms of the objective; scalar tensors.

    Raises:
        FlowError: h is not positive, the probes are missing, or the labels do not fit.
        SolveError: the block cannot be solved.

    Reference: JKO-iFlow, Eq. (8).
    """
    if h is not None and not 0 < h < math.inf:
        raise FlowError(f"the step size h must be positive and finite, found {h}")
    condition = None if labels is None else Condition(labels)
    moved = block.transport(z, divergence=divergence, eps=eps, condition=condition)
    assert moved.log_det is not None
    batch = z.shape[0]
    squared_norm = moved.z.square().sum() / batch
    squared_movement = (moved.z - z).square().sum() / batch
    potential = squared_norm / 2
    neg_log_det = -moved.log_det.mean()
    total = potential + neg_log_det
    movement = None
    if h is not None:
        movement = squared_movement / (2 * h)
        total = total + movement
    return JkoLoss(
        total,
        potential,
        neg_log_det,
        movement,
        squared_movement.detach(),
        squared_norm.detach(),
        moved.nfe,
        batch,
    )


def join_losses(parts: Sequence[AnyLoss]) -> AnyLoss:
    """Return the loss of a batch from those of its parts: means weighted by samples, detached.

    Args:
        parts: losses of one objective, at least one.
    """
    first, samples = parts[0], sum(part.samples for part in parts)
    means: dict[str, Any] = {}
    for item in fields(first):
        if isinstance(getattr(first, item.name), Tensor):
            terms = [getattr(part, item.name).detach() for part in parts]
            weights = [part.samples / samples for part in parts]
            means[item.name] = sum(w * term for w, term in zip(weights, terms, strict=True))
    return replace(first, **means, samples=samples)


@dataclass(frozen=True)
class LfmLoss:
    """The regression loss of (local) flow matching.

    Attributes:
        total: E ‖v(t, I_t) − İ_t‖², a scalar tensor; 0 for an empty batch.
        samples: number of samples in the mean.
    """

    total: Tensor
    samples: int

    def per_dim(self, dim: int) -> dict[str, float]:
        """Return the loss divided by D, for logs."""
        return {"total": float(self.total.detach()) / dim}


def ou_target(z: Tensor, gamma: float | None, noise: Tensor) -> Tensor:
    """Compute the state of the Ornstein–Uhlenbeck process from z after time γ.

        z' = e^{−γ} z + √(1 − e^{−2γ}) g

    Args:
        z: samples (B, *shape).
        gamma: γ, positive; None is infinity, whose state is the noise itself.
        noise: g ~ N(0, I), (B, *shape).

    Returns:
        z', (B, *shape).

    Raises:
        FlowError: γ is not positive and finite.

    Reference: Xu, Cheng, Xie, "Local flow matching generative models" (2024).
    """
    if gamma is None:
        return noise
    if not 0 < gamma < math.inf:
        raise FlowError(f"gamma must be positive and finite, found {gamma}")
    # −expm1(−2γ) keeps its digits for small γ.
    return math.exp(-gamma) * z + math.sqrt(-math.expm1(-2 * gamma)) * noise


def interpolate(z: Tensor, target: Tensor, t: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Compute the interpolant I_t of two samples and its time derivative İ_t.

        linear: I_t = (1 − t) z + t z';  trigonometric: I_t = cos(πt/2) z + sin(πt/2) z'

    Args:
        z: starts z (B, *shape).
        target: ends z' (B, *shape).
        t: times (B,) in [0, 1].
        kind: ``linear`` | ``trigonometric``.

    Returns:
        I_t and İ_t, (B, *shape) each.

    Raises:
        FlowError: the kind is unknown.
    """
    t = t.reshape(-1, *[1] * (z.dim() - 1))
    if kind == "linear":
        slope = target - z
        return z + t * slope, slope
    if kind == "trigonometric":
        cos, sin = torch.cos(t * (math.pi / 2)), torch.sin(t * (math.pi / 2))
        return cos * z + sin * target, (math.pi / 2) * (cos * target - sin * z)
    raise FlowError(f"unknown interpolant {kind!r}; choose one of {', '.join(INTERPOLANTS)}")


def matching_loss(
    velocity: Velocity,
    z: Tensor,
    target: Tensor,
    t: Tensor,
    interpolant: str = "linear",
    labels: Tensor | None = None,
    samples: int | None = None,
) -> LfmLoss:
    """Compute the flow-matching regression E ‖v(t, I_t) − İ_t‖² on given pairs and times.

    Args:
        velocity: the field in training.
        z: starts (B, *shape).
        target: ends (B, *shape); row i is paired with row i of the starts.
        t: times (B,) in [0, 1].
        interpolant: ``linear`` | ``trigonometric``.
        labels: int64 (B,), for a field with classes.
        samples: number that the sum over samples is divided by; None is B.

    Returns:
        the loss; its total is a scalar tensor.

    Raises:
        FlowError: the interpolant is unknown.

    Reference: Xu, Cheng, Xie, "Local flow matching generative models" (2024).
    """
    position, slope = interpolate(z, target, t, interpolant)
    residual = velocity(t, position, *optional(labels)) - slope
    count = z.shape[0] if samples is None else samples
    return LfmLoss(residual.square().sum() / max(1, count), count)
