"""What a block minimises: means over the batch, per sample, never silently normalised."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flows.block import Block
from flows.errors import FlowError
from flows.networks.base import Velocity, given
from flows.networks.condition import Condition
from flows.solving.divergence import Divergence

OBJECTIVES = ("jko", "lfm", "distill")
INTERPOLANTS = ("linear", "trigonometric")
TIMES = ("uniform", "logit-normal")


@dataclass(frozen=True)
class JkoLoss:
    """The terms of the JKO objective, in nats per sample; 0-d tensors.

    Attributes:
        total: potential + neg_log_det + movement; the one to differentiate.
        potential: E ½‖T(z)‖².
        neg_log_det: −E ∫ ∇·v dt.
        movement: E ‖T(z) − z‖² / 2h; None for the free block.
        squared_movement: E ‖T(z) − z‖², without the weight (detached).
        squared_norm: E ‖T(z)‖² (detached); with it
        :func:`flows.objectives.schedule.stopping_ratio`.
        nfe: evaluations of the right-hand side.
        samples: that the means are over.
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
        """The terms divided by D, as floats, for logs."""
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
    eps: Tensor | None = None,
    labels: Tensor | None = None,
) -> JkoLoss:
    """The objective of one JKO step, whose minimiser is the proximal step of KL(· ‖ N(0, I)).

    E[ ½‖T(z)‖² − ∫₀¹ ∇·v dt + ‖T(z) − z‖² / 2h ]

    Up to a constant this is KL(T_# p ‖ N(0, I)) + W₂²/2h; with classes, its mean over them: each
    makes a step of its own.

    Args:
        block: the block in training.
        z: (B, *shape), samples pushed through the blocks before it.
        h: step size, positive; None for the free block, which has no movement term.
        divergence: estimator of ∇·v.
        eps: its probe, held through the solve.
        labels: int64 (B,), for a block with classes.

    Raises:
        FlowError: h is not positive, the probe is missing, or the labels do not fit.
        SolveError: the block cannot be solved.

    Reference: JKO-iFlow Eq. (8).
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


@dataclass(frozen=True)
class LfmLoss:
    """The local-flow-matching regression, summed over dimensions, mean over samples.

    Attributes:
        total: E ‖v(t, I_t) − İ_t‖², 0-d; 0 over no samples.
        samples: that the mean is over.
    """

    total: Tensor
    samples: int

    def per_dim(self, dim: int) -> dict[str, float]:
        """The loss divided by D, as a float, for logs."""
        return {"total": float(self.total.detach()) / dim}


def ou_target(z: Tensor, gamma: float | None, noise: Tensor) -> Tensor:
    """Where the Ornstein–Uhlenbeck process carries z in time γ: e^{−γ} z + √(1 − e^{−2γ}) g.

    Args:
        z: (B, *shape).
        gamma: time, positive; None for infinity, which gives the noise itself.
        noise: g ~ N(0, I), (B, *shape).

    Raises:
        FlowError: γ is not positive.
    """
    if gamma is None:
        return noise
    if not 0 < gamma < math.inf:
        raise FlowError(f"gamma must be positive and finite, found {gamma}")
    # −expm1(−2γ) keeps its digits for small γ.
    return math.exp(-gamma) * z + math.sqrt(-math.expm1(-2 * gamma)) * noise


def interpolate(z: Tensor, target: Tensor, t: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The interpolant I_t and its time derivative.

    linear: I = (1 − t) z + t z'; trigonometric: I = cos(πt/2) z + sin(πt/2) z'.

    Args:
        z: start (B, *shape).
        target: end z' (B, *shape).
        t: times (B,) in [0, 1].
        kind: ``linear`` | ``trigonometric``.

    Raises:
        FlowError: unknown kind.
    """
    t = t.reshape(-1, *[1] * (z.dim() - 1))
    if kind == "linear":
        slope = target - z
        return z + t * slope, slope
    if kind == "trigonometric":
        cos, sin = torch.cos(t * (math.pi / 2)), torch.sin(t * (math.pi / 2))
        return cos * z + sin * target, (math.pi / 2) * (cos * target - sin * z)
    raise FlowError(f"unknown interpolant {kind!r}; choose one of {', '.join(INTERPOLANTS)}")


def lfm_loss(
    velocity: Velocity,
    z: Tensor,
    gamma: float | None,
    interpolant: str = "linear",
    generator: torch.Generator | None = None,
    labels: Tensor | None = None,
) -> LfmLoss:
    """The simulation-free objective of one block: E ‖v(t, I_t) − İ_t‖².

    t ~ U(0, 1) and g ~ N(0, I) are drawn anew at each call. With γ = None the target is pure
    noise: the last block, or ordinary flow matching with a single one.

    Args:
        velocity: the field in training.
        z: (B, *shape), samples of p_{k−1}.
        gamma: Ornstein–Uhlenbeck time of the block, or None.
        interpolant: ``linear`` | ``trigonometric``.
        generator: source of g and t.
        labels: int64 (B,), for a field with classes.

    Raises:
        FlowError: γ or the interpolant is not valid.

    Reference: Xu, Cheng, Xie, "Local flow matching generative models" (2024).
    """
    device = z.device if generator is None else generator.device
    noise = torch.randn(z.shape, generator=generator, device=device, dtype=z.dtype)
    t = torch.rand(z.shape[0], generator=generator, device=device, dtype=z.dtype).to(z.device)
    target = ou_target(z, gamma, noise.to(z.device))
    return matching_loss(velocity, z, target, t, interpolant, labels)


def matching_loss(
    velocity: Velocity,
    z: Tensor,
    target: Tensor,
    t: Tensor,
    interpolant: str = "linear",
    labels: Tensor | None = None,
) -> LfmLoss:
    """The regression E ‖v(t, I_t) − İ_t‖² on given pairs and times.

    Args:
        velocity: the field in training.
        z: starts (B, *shape).
        target: ends (B, *shape), paired with the starts row by row.
        t: times (B,) in [0, 1].
        interpolant: ``linear`` | ``trigonometric``.
        labels: int64 (B,), of the starts, for a field with classes.

    Raises:
        FlowError: unknown interpolant.
    """
    position, slope = interpolate(z, target, t, interpolant)
    residual = velocity(t, position, *given(labels)) - slope
    return LfmLoss(residual.square().sum() / max(1, z.shape[0]), z.shape[0])
