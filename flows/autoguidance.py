"""Guidance by a second, weaker flow: what the better one does is done more strongly.

Given the velocity v of a flow, with or without classes, and that v_g of a guide (a smaller
network, or one trained for less long), samples follow

    v_g(t, z) + w (v(t, z, y) − v_g(t, z)),

where the guide never sees the class: w = 1 is the flow's own field, w > 1 extrapolates away from
the guide's errors, which are the flow's own, only larger, and from what is not of the class.

Reference: Karras et al., "Guiding a diffusion model with a bad version of itself" (2024).
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from flows.block import Block
from flows.errors import FlowError
from flows.flow import Flow
from flows.networks.base import Piece, Velocity, given
from flows.networks.piecewise import ROUNDING, aligned


class Guided(Velocity):
    """A velocity led away from that of a guide.

    Args:
        inner: the velocity, with or without classes.
        guide: of the same samples; one with classes is asked for that of no class.
        weight: w, finite and not negative.

    Raises:
        FlowError: other samples, or w out of range.
    """

    def __init__(self, inner: Velocity, guide: Velocity, weight: float) -> None:
        super().__init__(inner.shape, inner.classes)
        if guide.shape != inner.shape:
            raise FlowError(
                f"a guide has the samples of its flow, {inner.shape}, not {guide.shape}"
            )
        if not 0 <= weight < math.inf:
            raise FlowError(f"guidance must be finite and not negative, found {weight}")
        self.inner, self.guide, self.weight = inner, guide, weight

    def forward(self, t: Tensor, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """See :class:`Velocity`."""
        v = self.inner(t, z, *given(labels))
        null = None
        if self.guide.classes:
            null = torch.full((len(z),), self.guide.classes, device=z.device)
        return torch.lerp(self.guide(t, z, *given(null)), v, self.weight)

    def pieces(self) -> tuple[Piece, ...]:
        """See :class:`Velocity`; from each jump of either field to the next of either."""
        ours, theirs = self.inner.pieces(), self.guide.pieces()
        if len(ours) == len(theirs) == 1:
            return super().pieces()
        return tuple(
            Piece(start, end, Guided(a.field, b.field, self.weight))
            for a in ours
            for b in theirs
            if (end := min(a.end, b.end)) - (start := max(a.start, b.start)) > ROUNDING
        )


def guided(flow: Flow, guide: Flow, weight: float) -> Flow:
    """The flow whose blocks are led away from those of a guide, which shares all weights.

    Args:
        flow: K blocks.
        guide: K blocks of the same samples.
        weight: w, see the module.

    Raises:
        FlowError: another number of blocks, or as :class:`Guided`.
    """
    if len(guide) != len(flow):
        raise FlowError(f"a guide has the blocks of its flow, {len(flow)}, not {len(guide)}")
    led = Flow(flow.shape)
    for spec, block, other in zip(flow.specs, flow, guide, strict=True):
        velocity, solver = Guided(block.velocity, other.velocity, weight), block.solver
        if not solver.adaptive:  # the guide may have more networks, with jumps of their own
            solver = replace(solver, steps=aligned(velocity.pieces(), solver.steps))
        led.blocks.append(Block(velocity, solver))
        led.specs.append(spec)
    return led
