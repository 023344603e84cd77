"""A flow whose networks are evaluated in bfloat16; solver and guidance stay in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from flows.block import Block
from flows.flow import Flow
from flows.networks.base import Piece, Velocity, given


class HalfPrecision(Velocity):
    """A velocity under autocast to bfloat16, returned in the precision of its samples.

    Args:
        inner: the velocity; its weights stay as they are.
    """

    def __init__(self, inner: Velocity) -> None:
        super().__init__(inner.shape, inner.classes)
        self.inner = inner

    def forward(self, t: Tensor, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """See :class:`Velocity`."""
        with torch.autocast(z.device.type, torch.bfloat16):
            return self.inner(t, z, *given(labels)).to(z.dtype)

    def told(self, beside: Tensor) -> Velocity:
        """See :class:`Velocity`; the inner field told so, in bfloat16."""
        return HalfPrecision(self.inner.told(beside))

    def pieces(self) -> tuple[Piece, ...]:
        """See :class:`Velocity`; those of the inner field."""
        inner = self.inner.pieces()
        return tuple(Piece(each.start, each.end, HalfPrecision(each.field)) for each in inner)


def in_half(flow: Flow) -> Flow:
    """The flow with its networks in bfloat16; shares all weights."""
    halved = Flow(flow.shape)
    for spec, block in zip(flow.specs, flow, strict=True):
        halved.blocks.append(Block(HalfPrecision(block.velocity), block.solver))
        halved.specs.append(spec)
    return halved
