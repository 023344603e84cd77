"""One optimiser step's loss of a block under (local) flow matching.

Nothing is integrated: the block's samples z and their targets z' (see `flows.objectives.losses`)
are
joined by an interpolant, and the velocity is regressed on its slope. Noise and times are drawn
for the whole batch, and each process takes its rows, so that they do not depend on the number of
processes.

Reference: Xu, Cheng, Xie, "Local flow matching generative models" (2024).
"""

from __future__ import annotations

import torch
from torch import Tensor

from flows.networks.base import Velocity
from flows.networks.image_condition import ImageConditionedNetwork
from flows.objectives.coupling import optimal_pairing
from flows.objectives.losses import LfmLoss, matching_loss, ou_target
from pipeline.config.schema import MatchingConfig
from pipeline.storage.shards import StoreReader
from pipeline.training.parallel import Rows, every

#: field of a stage: the conditioning image of every sample
IMAGE = "image"


def batch_loss(
    velocity: Velocity,
    stage: StoreReader,
    indices: Tensor,
    gamma: float | None,
    options: MatchingConfig,
    drawn: torch.Generator,
    rows: Rows = every,
    dropout: float = 0.0,
) -> LfmLoss:
    """The regression on this process's share of a batch.

    Args:
        velocity: the field in training.
        stage: the samples that the block trains on.
        indices: of the whole batch (B,).
        gamma: Ornstein–Uhlenbeck time of the block; None aims at pure noise.
        options: interpolant, coupling and times.
        drawn: source of noise and times, the same on all processes.
        rows: which of the samples are this process's.
        dropout: probability that a sample goes without its class, for a field with classes.
    """
    device = next(velocity.parameters()).device
    noise = torch.randn((len(indices), *velocity.shape), generator=drawn)
    t = stratified_times(len(indices), drawn)
    if options.times == "logit-normal":
        t = logit_normal(t)
    mine = rows(t)
    labels = stage.take("labels", indices) if velocity.classes else None
    told = labels
    if labels is not None:
        dropped = torch.rand(len(indices), generator=drawn) < dropout
        told = labels.masked_fill(dropped, velocity.classes)[mine].to(device)
    if options.coupling == "ot":  # of the whole batch, on every process: it is one pairing
        z = stage.take("z", indices).float()
        target = ou_target(z, gamma, noise)
        target = target[optimal_pairing(z, target, labels)]
        z, target = z[mine], target[mine]
    else:
        z = stage.take("z", indices[mine]).float()
        target = ou_target(z, gamma, noise[mine])
    z, target, t = (x.to(device) for x in (z, target, t[mine]))
    if isinstance(velocity, ImageConditionedNetwork):
        velocity = velocity.with_image(stage.take(IMAGE, indices[mine]).float().to(device))
    return matching_loss(velocity, z, target, t, options.interpolant, told)


def pair_loss(
    velocity: Velocity,
    stage: StoreReader,
    indices: Tensor,
    drawn: torch.Generator,
    rows: Rows = every,
) -> LfmLoss:
    """The regression on the straight ways from samples to where other blocks carry them.

    E ‖v(t, (1 − t) z + t T(z)) − (T(z) − z)‖²

    Where the ways do not cross, its minimum is the field of straight trajectories whose map is T:
    one step of any solver follows it, in either direction.

    Args:
        velocity: the field in training.
        stage: pairs, z in the field `z` and T(z) in the field `end`; for a field with classes,
            these in the field `labels`.
        indices: of the whole batch (B,).
        drawn: source of the times, the same on all processes.
        rows: which of the samples are this process's.

    Reference: Xu, Cheng, Xie, "Local flow matching generative models" (2024), distillation; Liu,
    Gong, Liu, "Flow straight and fast" (2023).
    """
    device = next(velocity.parameters()).device
    t = stratified_times(len(indices), drawn)
    mine = rows(t)
    t, chosen = t[mine], indices[mine]
    z, end, t = (x.to(device) for x in (stage.take("z", chosen), stage.take("end", chosen), t))
    labels = stage.take("labels", chosen).to(device) if velocity.classes else None
    return matching_loss(velocity, z, end, t, labels=labels)


def stratified_times(count: int, drawn: torch.Generator) -> Tensor:
    """Uniform times (count,), one in each of `count` equal parts of [0, 1].

    Each alone is uniform (up to the order, and the samples of a batch are in random order); their
    mean over a batch varies less than that of independent ones.
    """
    return (torch.arange(count) + torch.rand(count, generator=drawn)) / count


def logit_normal(u: Tensor) -> Tensor:
    """Uniform numbers in (0, 1) as logit-normal ones, whose logit is N(0, 1); shape kept.

    The regression weighs the middle of the way more, where noise and data are hardest to tell
    apart; what it tends to is the same field.

    Reference: Esser et al., "Scaling rectified flow transformers for high-resolution image
    synthesis" (2024), section 3.1.
    """
    inside = u.double().clamp(1e-6, 1 - 1e-6)
    return torch.special.ndtri(inside).sigmoid().to(u.dtype)
