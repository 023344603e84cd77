"""Notices, while a block trains, that its field has outgrown the grid it is followed on.

The objective is differentiated through the grid, so a field that the grid no longer resolves is
rewarded for what the grid gets wrong, and soon learns nothing else. On twice as many sub-intervals
the same field is worth less: the two objectives part long before the block is spoilt.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from flows.block import Block
from flows.errors import SolveError
from flows.networks.condition import Condition
from flows.solving.divergence import Divergence

#: optimiser steps between two looks
EVERY = 10
#: samples that are looked at: a part of the batch, but so many at least (half a batch takes 5 % of
#: the time where an iteration takes three times as long as following its batch without gradients)
PART, AT_LEAST = 8, 32
#: largest difference that a grid is kept with, in nats per dimension; of a finished block three
#: times as much is warned of (`pipeline.training.diagnostics`). 0.001 chases the roughness of
#: weights that are
#: still moving: a UNet on CIFAR-10's latents was given 9 sub-intervals of RK4 after 130 steps,
#: where with 4 throughout the finished block was off by 0.0001
TOLERANCE = 0.003


def looked_at(rows: Tensor) -> Tensor:
    """Those rows of a batch that are looked at."""
    return rows[: max(AT_LEAST, len(rows) // PART)]


def finer(steps: int, nets: int, most: int) -> int:
    """The next grid: half as many sub-intervals again, which RK4 rewards five times over.

    Args:
        steps: S of the grid so far.
        nets: networks of the block, each of which needs as many sub-intervals as the others.
        most: largest S that is allowed, a multiple of ``nets``.

    Returns:
        a multiple of ``nets``, larger than S unless that is ``most`` or more.
    """
    each = steps // nets
    return max(steps, min(nets * max(each + 1, 3 * each // 2), most))


@torch.no_grad()
def grid_error(
    block: Block,
    z: Tensor,
    h: float | None,
    divergence: Divergence,
    eps: Tensor | None,
    labels: Tensor | None,
) -> float:
    """How far the objective on a block's grid is from that on twice as many sub-intervals.

    Args:
        block: in training, on a fixed grid.
        z: samples before it, (B, *shape).
        h: its step size; None for the free block.
        divergence: the estimator that trains it.
        eps: its probe, the same on both grids.
        labels: int64 (B,), for a block with classes.

    Returns:
        the mean difference in nats per dimension, what is beyond one standard error of it, at
        least 0; infinity where the finer grid cannot be followed, or the coarser.
    """
    grid = block.solver
    allowed = 2 * grid.max_evaluations
    twice = dataclasses.replace(grid, steps=2 * grid.steps, max_evaluations=allowed)
    condition = None if labels is None else Condition(labels)
    values = []
    try:
        for solver in (grid, twice):
            moved = block.transport(z, False, divergence, eps, solver, condition)
            assert moved.log_det is not None
            value = moved.z.square().flatten(1).sum(1) / 2 - moved.log_det
            if h is not None:
                value = value + (moved.z - z).square().flatten(1).sum(1) / (2 * h)
            values.append(value.double())
    except SolveError:
        return math.inf
    apart = (values[0] - values[1]) / block.velocity.dim
    doubt = float(apart.std()) / math.sqrt(len(z)) if len(z) > 1 else 0.0
    difference = max(0.0, abs(float(apart.mean())) - doubt)
    return difference if math.isfinite(difference) else math.inf
