"""Autoguidance: a flow extrapolated away from a weaker flow, the guide.

    v_g(t, z) + w (v(t, z, y) − v_g(t, z))

The guide's velocity v_g never sees the class y: it is a smaller network, or one trained for less
time. w > 1 extrapolates away from its errors, which are the flow's own, only larger.

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
from flows.networks.base import SmoothPiece, Velocity, optional
from flows.networks.piecewise import ROUNDING, aligned_steps


class Autoguided(Velocity):
    """A velocity extrapolated away from that of a guide on the same samples.

    A guide with classes is evaluated at the null label. The weight w is finite and not negative.

    Raises:
        FlowError: the samples have different shapes, or w is out of range.
    """

    def __init__(self, inner: Velocity, guide: Velocity, weight: float) -> None:
        super().__init__(inner.shape, inner.classes)
        if guide.shape != inner.shape:
            raise FlowError(
                f"the guide has samples of shape {guide.shape}; expected the flow's, {inner.shape}"
            )
        if not 0 <= weight < math.inf:
            raise FlowError(f"guidance must be finite and not negative, found {weight}")
        self.inner, self.guide, self.weight = inner, guide, weight

    def forward(self, t: Tensor, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Evaluate v_g + w (v − v_g) at z (B, *shape); see :class:`Velocity`."""
        v = self.inner(t, z, *optional(labels))
        null = None
        if self.guide.classes:
            null = torch.full((z.shape[0],), self.guide.classes, device=z.device)
        return torch.lerp(self.guide(t, z, *optional(null)), v, self.weight)

    def smooth_pieces(self) -> tuple[SmoothPiece, ...]:
        """Return the intervals between the jumps of both fields; see :class:`Velocity`."""
        pieces, guide_pieces = self.inner.smooth_pieces(), self.guide.smooth_pieces()
        if len(pieces) == len(guide_pieces) == 1:
            return super().smooth_pieces()
        return tuple(
            SmoothPiece(start, end, Autoguided(a.field, b.field, self.weight))
            for a in pieces
            for b in guide_pieces
            if (end := min(a.end, b.end)) - (start := max(a.start, b.start)) > ROUNDING
        )


def autoguide(flow: Flow, guide: Flow, weight: float) -> Flow:
    """Return the flow with each block extrapolated away from the guide's block.

    The result shares the weights of both. A fixed grid gets the least number of sub-intervals that
    also has a node at the guide's jumps.

    Raises:
        FlowError: the numbers of blocks or the shapes differ, or w is out of range.
    """
    if len(guide) != len(flow):
        raise FlowError(f"the guide has {len(guide)} blocks; expected the flow's, {len(flow)}")
    blocks = []
    for block, weaker in zip(flow, guide, strict=True):
        velocity = Autoguided(block.velocity, weaker.velocity, weight)
        solver = block.solver
        if not solver.adaptive:
            steps = aligned_steps(velocity.smooth_pieces(), solver.steps)
            solver = replace(solver, steps=steps)
        blocks.append(Block(velocity, solver))
    return Flow.from_blocks(flow.shape, zip(flow.specs, blocks, strict=True))
