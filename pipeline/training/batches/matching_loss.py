"""Loss of one optimiser step of a block under (local) flow matching.

Nothing is integrated. The block's samples z and their targets z' (`flows.objectives.losses`) are
joined by an interpolant, and the velocity is regressed on its slope. Noise and times are drawn for
the whole batch, and each rank takes its rows. So the loss does not depend on the number of ranks.
Some of a block's several networks (`flows.networks.piecewise`) take the rows of their times alone.

Reference: Xu, Cheng, Xie, "Local flow matching generative models" (2024).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from flows.networks.base import Velocity
from flows.networks.image_condition import ImageConditionedNetwork
from flows.networks.piecewise import PiecewiseVelocity
from flows.objectives.coupling import optimal_pairing
from flows.objectives.losses import LfmLoss, matching_loss, ou_target
from flows.spec import BlockSpec
from pipeline.config.training import MatchingConfig
from pipeline.runtime.devices import to_device
from pipeline.storage.shards.reader import StoreReader

#: field of a stage: the image that each sample is conditioned on
IMAGE = "image"


class Regression(Protocol):
    """Loss of an objective that integrates nothing."""

    def __call__(
        self,
        velocity: Velocity,
        stage: StoreReader,
        batch: Tensor,
        source: torch.Generator,
        rows: Tensor,
    ) -> LfmLoss:
        """Compute the mean loss over this rank's share of a batch.

        Args:
            velocity: in training.
            stage: the samples that the block trains on.
            batch: indices of the samples of the whole batch (B,).
            source: of noise and times, the same on every rank.
            rows: positions in `batch` of this rank's samples, int64.
        """


def matching_regression(spec: BlockSpec, options: MatchingConfig) -> Regression:
    """Return the flow-matching loss of a block.

    Args:
        spec: of the block: γ and the class dropout.
        options: interpolant, coupling and times.
    """

    def regression(
        velocity: Velocity,
        stage: StoreReader,
        batch: Tensor,
        source: torch.Generator,
        rows: Tensor,
    ) -> LfmLoss:
        dropout = spec.velocity.class_dropout
        return batch_loss(velocity, stage, batch, spec.gamma, options, source, rows, dropout)

    return regression


def batch_loss(
    velocity: Velocity,
    stage: StoreReader,
    batch: Tensor,
    gamma: float | None,
    options: MatchingConfig,
    source: torch.Generator,
    rows: Tensor | None = None,
    dropout: float = 0.0,
) -> LfmLoss:
    """Compute the flow-matching loss on this rank's share of a batch.

    A velocity with only some of a block's networks sums over the rows of their times, and divides
    by the number of all. So the losses and gradients of networks that train alone add up to those
    of the block.

    Args:
        velocity: in training.
        stage: the samples that the block trains on.
        batch: indices of the samples of the whole batch (B,).
        gamma: Ornstein–Uhlenbeck time of the block; None takes pure noise as the target.
        options: interpolant, coupling and times.
        source: of noise and times, the same on every rank.
        rows: positions in `batch` of this rank's samples; None is all.
        dropout: probability that the class of a sample is left out, for a velocity with classes.
    """
    device = next(velocity.parameters()).device
    rows = torch.arange(len(batch)) if rows is None else rows
    noise = torch.randn((len(batch), *velocity.shape), generator=source)
    t = stratified_times(len(batch), source)
    if options.times == "logit-normal":
        t = logit_normal(t)
    share = len(rows)
    if isinstance(velocity, PiecewiseVelocity):
        rows = rows[velocity.covers(t[rows])]
    labels = stage.take("labels", batch) if velocity.classes else None
    kept_labels = None
    if labels is not None:
        dropped = torch.rand(len(batch), generator=source) < dropout
        kept_labels = labels.masked_fill(dropped, velocity.classes)[rows].to(device)
    if options.coupling == "ot":  # the pairing is that of the whole batch, on every rank
        z = stage.take("z", batch).float()
        target = ou_target(z, gamma, noise)
        target = target[optimal_pairing(z, target, labels)]
        z, target = z[rows], target[rows]
    else:
        z = stage.take("z", batch[rows]).float()
        target = ou_target(z, gamma, noise[rows])
    z, target, t = (to_device(tensor, device) for tensor in (z, target, t[rows]))
    if isinstance(velocity, ImageConditionedNetwork):
        image = stage.take(IMAGE, batch[rows]).float()
        velocity = velocity.with_image(to_device(image, device))
    return matching_loss(velocity, z, target, t, options.interpolant, kept_labels, share)


def stratified_times(count: int, source: torch.Generator) -> Tensor:
    """Draw stratified uniform times (count,): one in each of `count` equal parts of [0, 1].

    The mean of a function over them has a lower variance than over independent times.
    """
    return (torch.arange(count) + torch.rand(count, generator=source)) / count


def logit_normal(u: Tensor) -> Tensor:
    """Map uniform values in (0, 1) to logit-normal ones, whose logit is N(0, 1); same shape.

    The regression then weighs the middle of the interpolant more, where noise and data are hardest
    to separate. Its minimum is the same velocity.

    Reference: Esser et al., "Scaling rectified flow transformers for high-resolution image
    synthesis" (2024), section 3.1.
    """
    inside = u.double().clamp(1e-6, 1 - 1e-6)
    return torch.special.ndtri(inside).sigmoid().to(u.dtype)
