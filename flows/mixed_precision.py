"""Mixed precision: networks in bfloat16, solver and guidance in float32."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from flows.block import Block
from flows.flow import Flow
from flows.networks.base import SmoothPiece, Velocity, optional


def has_bfloat16(device: torch.device) -> bool:
    """Return whether a device computes in bfloat16 without slow emulation.

    Processors with AVX2 or less emulate it. A matrix product then takes about 30 times as long
    as one in float32. GPUs older than NVIDIA's Ampere emulate it, too.
    """
    if device.type == "cpu":
        return torch.backends.cpu.get_cpu_capability().startswith(("AVX512", "SVE"))
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "mps"


class MixedPrecision(Velocity):
    """A velocity under autocast to bfloat16; weights and result keep their dtypes.

    Its derivatives have bfloat16's rounding, too; differences of two values are lost in it.
    """

    def __init__(self, inner: Velocity) -> None:
        super().__init__(inner.shape, inner.classes)
        self.inner = inner

    def forward(self, t: Tensor, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Evaluate the network at z (B, *shape) in bfloat16; see :class:`Velocity`."""
        with torch.autocast(z.device.type, torch.bfloat16):
            return self.inner(t, z, *optional(labels)).to(z.dtype)

    def with_image(self, image: Tensor) -> Velocity:
        """Condition the inner field on images (B, K, H, W); see :class:`Velocity`."""
        return MixedPrecision(self.inner.with_image(image))

    def smooth_pieces(self) -> tuple[SmoothPiece, ...]:
        """Return the pieces of the inner field, each in bfloat16; see :class:`Velocity`."""
        pieces = self.inner.smooth_pieces()
        return tuple(replace(piece, field=MixedPrecision(piece.field)) for piece in pieces)


def in_mixed_precision(flow: Flow) -> Flow:
    """Return the flow with its networks evaluated in bfloat16; the flows share all weights."""
    blocks = (Block(MixedPrecision(block.velocity), block.solver) for block in flow)
    return Flow.from_blocks(flow.shape, zip(flow.specs, blocks, strict=True))
