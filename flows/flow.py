"""A flow: a sequence of blocks from the data side to the noise side."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor, nn

from flows.block import Block, Transport
from flows.errors import FlowError, SolveError
from flows.networks.condition import Condition, in_chunks
from flows.noise import draw_gaussian
from flows.solving.divergence import Divergence
from flows.solving.solver import SolverConfig
from flows.spec import BlockSpec

#: samples that a pass holds in memory together
CHUNK = 4096
#: one solver for all blocks, or one for each block in the flow's order; None is each block's own
Solvers = SolverConfig | Sequence[SolverConfig] | None


@dataclass(frozen=True)
class FlowTransport:
    """Samples (n, *shape) at the other end of the flow, and evaluations of v per sample."""

    z: Tensor
    nfe: int


class Flow(nn.Module):
    """Blocks 0 … K−1, each with the specification that it was built from.

        z_0 (data) ──block 0──▶ … ──block K−1──▶ z_K ~ N(0, I)

    Encoding runs left to right, decoding and sampling right to left. No method records gradients
    but :meth:`transport_block`: training transports samples through one block at a time
    (:meth:`flows.block.Block.transport`).
    Without :meth:`from_blocks` a flow on samples (D,) or (C, H, W) has no blocks.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(int(size) for size in shape)
        self.dim = math.prod(self.shape)
        self.blocks = nn.ModuleList()
        self.specs: list[BlockSpec] = []

    @classmethod
    def from_blocks(cls, shape: Sequence[int], blocks: Iterable[tuple[BlockSpec, Block]]) -> Flow:
        """Join (specification, block) pairs, data side first, into a flow that shares them."""
        flow = cls(shape)
        for spec, block in blocks:
            flow.specs.append(spec)
            flow.blocks.append(block)
        return flow

    @property
    def classes(self) -> int:
        """Return the number of classes that condition the flow; 0 for an unconditional flow."""
        return self[0].velocity.classes if len(self) else 0

    # ---------------------------------------------------------------- the sequence of blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __iter__(self) -> Iterator[Block]:
        return iter(self.blocks)  # type: ignore[arg-type]

    @overload
    def __getitem__(self, index: int) -> Block: ...
    @overload
    def __getitem__(self, index: slice) -> Flow: ...
    def __getitem__(self, index: int | slice) -> Block | Flow:
        """Return a block, or the flow of some blocks, which shares their weights: ``flow[:k]``."""
        if isinstance(index, slice):
            blocks: list[Block] = list(self)[index]
            return Flow.from_blocks(self.shape, zip(self.specs[index], blocks, strict=True))
        return self.blocks[index]  # type: ignore[return-value]

    # ---------------------------------------------------------------- maps

    def encode(
        self,
        z_0: Tensor,
        solver: Solvers = None,
        chunk: int = CHUNK,
        condition: Condition | None = None,
    ) -> Tensor:
        """Map data z_0 (n, *shape) to noise z_K (n, *shape); see :meth:`transport`."""
        return self.transport(z_0, False, solver, chunk, condition).z

    def decode(
        self,
        z_K: Tensor,
        solver: Solvers = None,
        chunk: int = CHUNK,
        condition: Condition | None = None,
    ) -> Tensor:
        """Map noise z_K (n, *shape) to data z_0 (n, *shape); see :meth:`transport`."""
        return self.transport(z_K, True, solver, chunk, condition).z

    def draw_noise(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw n ≥ 1 samples z_K ~ N(0, I), (n, *shape), like the weights in device and dtype.

        The generator may be on another device. A smaller n is a FlowError.
        """
        if n < 1:
            raise FlowError(f"at least 1 sample must be drawn, not {n}")
        like = next(self.parameters(), torch.empty(0))
        return draw_gaussian((n, *self.shape), like, generator)

    def sample(
        self,
        n: int,
        generator: torch.Generator | None = None,
        solver: Solvers = None,
        chunk: int = CHUNK,
        condition: Condition | None = None,
    ) -> Tensor:
        """Draw n samples z_0 (n, *shape): decode z_K ~ N(0, I).

        All noise is drawn before the first chunk, so on a fixed grid samples do not depend on
        ``chunk``.
        """
        return self.decode(self.draw_noise(n, generator), solver, chunk, condition)

    @torch.no_grad()
    def transport(
        self,
        z: Tensor,
        reverse: bool = False,
        solver: Solvers = None,
        chunk: int = CHUNK,
        condition: Condition | None = None,
    ) -> FlowTransport:
        """Transport samples (n, *shape) through all blocks, ``chunk`` of them in memory together.

        ``reverse`` goes from noise to data. ``solver`` overrides the blocks' own; a sequence has
        one for each block. Adaptive solvers choose their steps for a chunk.

        Raises:
            FlowError: z has another shape, the condition does not fit, or the number of solvers is
                not that of blocks.
            SolveError: a block cannot be solved; the error names it.
        """
        self.check_samples(z)
        out, evaluations, start = torch.empty_like(z), 0, 0
        for part, given in in_chunks(z, condition, chunk):
            count = len(part)
            for index in self.block_order(reverse):
                moved = self.transport_block(index, part, reverse, solver, condition=given)
                part, evaluations = moved.z, evaluations + moved.nfe * count
            out[start : start + count] = part
            start += count
        return FlowTransport(out, round(evaluations / len(z)))

    @torch.no_grad()
    def trajectory(
        self,
        z: Tensor,
        reverse: bool = False,
        solver: Solvers = None,
        condition: Condition | None = None,
    ) -> Iterator[Tensor]:
        """Yield the samples (n, *shape) at the start and after every block, K + 1 tensors.

        The arguments are those of :meth:`transport`; all samples are in memory together.
        """
        self.check_samples(z)
        yield z
        for index in self.block_order(reverse):
            z = self.transport_block(index, z, reverse, solver, condition=condition).z
            yield z

    def block_order(self, reverse: bool) -> range:
        """Return the block indices in the order of a pass from data to noise, or in reverse."""
        return range(len(self) - 1, -1, -1) if reverse else range(len(self))

    def transport_block(
        self,
        index: int,
        z: Tensor,
        reverse: bool,
        solver: Solvers,
        divergence: Divergence | None = None,
        eps: Tensor | None = None,
        condition: Condition | None = None,
    ) -> Transport:
        """Transport samples (B, *shape) through the block of an index; a failure names the block.

        The other arguments are those of :meth:`flows.block.Block.transport`.
        """
        if isinstance(solver, Sequence):
            if len(solver) != len(self):
                raise FlowError(
                    f"the flow has {len(self)} blocks and {len(solver)} solvers; give one solver "
                    "for each block"
                )
            solver = solver[index]
        try:
            return self[index].transport(z, reverse, divergence, eps, solver, condition)
        except SolveError as failure:
            raise failure.in_block(index) from failure

    def check_samples(self, z: Tensor) -> None:
        """Raise FlowError unless z is (n, *shape) with n ≥ 1."""
        if tuple(z.shape[1:]) != self.shape or z.dim() == 0 or z.shape[0] < 1:
            raise FlowError(
                f"the flow takes samples (n, {', '.join(map(str, self.shape))}) with n ≥ 1, "
                f"found {tuple(z.shape)}"
            )
