"""A flow: an ordered list of blocks, data side first, noise side last."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
from torch import Tensor, nn

from flows.block import Block, SolverConfig, Transport
from flows.errors import FlowError, SolveError
from flows.networks.condition import Condition, check_labels, rows_of
from flows.networks.piecewise import TimeSlice, aligned, time_slice
from flows.solving.divergence import Divergence
from flows.spec import BlockSpec, build_block

FORMAT = 1
CHUNK = 4096
#: one solver for all blocks, or one a block in the flow's order; None is each block's own
Solvers = SolverConfig | Sequence[SolverConfig] | None


@dataclass(frozen=True)
class FlowTransport:
    """Samples carried through all blocks.

    Attributes:
        z: (n, *shape), at the other end.
        nfe: evaluations of v per sample, summed over blocks.
        block_nfe: the same for each block, in the flow's order.
        squared_movement: E ‖out − in‖² of each block, in the flow's order.
        squared_norm: E ‖out‖² of each block, where the samples leave it.
    """

    z: Tensor
    nfe: int
    block_nfe: tuple[int, ...]
    squared_movement: tuple[float, ...]
    squared_norm: tuple[float, ...]


class Flow(nn.Module):
    """Blocks 0 … K−1, each with the specification it was built from.

    z_0 (data) ──block 0──▶ … ──block K−1──▶ z_K ~ N(0, I). Encoding runs left to right, decoding
    and sampling right to left. No method here records gradients; training works on one block at a
    time through :meth:`flows.block.Block.transport`.

    Args:
        shape: of one sample, (D,) or (C, H, W).
        specs: one a block; may be empty, blocks are then added by :meth:`append`.
        generator: source of the initial weights.
    """

    def __init__(
        self,
        shape: Sequence[int],
        specs: Sequence[BlockSpec] = (),
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.shape = tuple(int(size) for size in shape)
        self.dim = math.prod(self.shape)
        self.blocks = nn.ModuleList()
        self.specs: list[BlockSpec] = []
        self.nfe = 0
        for spec in specs:
            self.append(spec, generator=generator)

    @property
    def classes(self) -> int:
        """Classes that samples are told apart by; 0 for a flow without."""
        return self[0].velocity.classes if len(self) else 0

    # ---------------------------------------------------------------- the list

    def __len__(self) -> int:
        return len(self.blocks)

    def __iter__(self) -> Iterator[Block]:
        return iter(self.blocks)  # type: ignore[arg-type]

    @overload
    def __getitem__(self, index: int) -> Block: ...
    @overload
    def __getitem__(self, index: slice) -> Flow: ...
    def __getitem__(self, index: int | slice) -> Block | Flow:
        """A block, or the flow of some of them, which shares their weights: ``flow[:k]``."""
        if isinstance(index, slice):
            part = Flow(self.shape)
            part.blocks.extend(list(self.blocks)[index])
            part.specs.extend(self.specs[index])
            return part
        return self.blocks[index]  # type: ignore[return-value]

    def append(
        self,
        spec: BlockSpec,
        warm_start: bool = False,
        generator: torch.Generator | None = None,
    ) -> Block:
        """Adds a block on the noise side.

        Args:
            spec: what to build.
            warm_start: copy the weights of the block before it, if there is one.
            generator: source of the initial weights.

        Raises:
            FlowError: a warm start from a block of another velocity.
        """
        return self._put(len(self), spec, warm_start, generator)

    def replace(
        self,
        index: int,
        spec: BlockSpec,
        warm_start: bool = False,
        generator: torch.Generator | None = None,
    ) -> Block:
        """Puts a new block in place of another; see :meth:`append`.

        A warm start copies the block *before* ``index``. To change a step size and keep the
        weights, use :meth:`respecify`.
        """
        if not 0 <= index < len(self):
            raise FlowError(f"block {index} does not exist; the flow has {len(self)}")
        return self._put(index, spec, warm_start, generator)

    def respecify(self, index: int, **changes: Any) -> BlockSpec:  # noqa: ANN401
        """Changes h, gamma, objective or solver of a block and keeps its weights."""
        fixed = {"velocity", "start", "length"} & set(changes)
        if fixed:
            raise FlowError(f"{', '.join(sorted(fixed))} cannot change without a new block")
        spec = replace(self.specs[index], **changes)
        self[index].solver = spec.solver
        self.specs[index] = spec
        return spec

    def _put(
        self, index: int, spec: BlockSpec, warm_start: bool, generator: torch.Generator | None
    ) -> Block:
        source = self.specs[index - 1] if warm_start and index else None
        if source is not None:
            if source.velocity != spec.velocity:
                raise FlowError(
                    f"block {index} cannot start from the weights of block {index - 1}: "
                    f"{spec.velocity} is not {source.velocity}"
                )
            spec = replace(spec, start=source.start, length=source.length)
        block = build_block(spec, self.shape, generator)
        if source is not None:
            block.load_state_dict(self.blocks[index - 1].state_dict())
        like = next(self.parameters(), None)
        if like is not None:
            block.to(device=like.device, dtype=like.dtype)
        if index == len(self):
            self.blocks.append(block)
            self.specs.append(spec)
        else:
            self.blocks[index] = block
            self.specs[index] = spec
        return block

    def refine_blocks(self, c: int, steps: int | None = None) -> Flow:
        """Splits every block into c children that together are the same map.

        Child j follows v on [j/c, (j+1)/c] with step size h/c, so it starts exactly on its
        parent's trajectory; the children own copies of the weights and can be trained apart. A
        free block (h None) has no step to divide and stays whole.

        Args:
            c: children a block, at least 1.
            steps: sub-intervals of a child; None shares the parent's, ⌈S/c⌉ or the next number
                whose grid meets the switches between several networks.

        Returns:
            a new flow; this one is not changed.

        Raises:
            FlowError: c < 1.

        Reference: JKO-iFlow, refinement of the trajectory.
        """
        if c < 1:
            raise FlowError(f"a block must be split into at least 1, not {c}")
        refined = Flow(self.shape)
        for spec, block in zip(self.specs, self, strict=True):
            children = 1 if spec.weight is None else c
            share = math.ceil(spec.solver.steps / children)
            whole = block.velocity
            inner = whole.inner if isinstance(whole, TimeSlice) else whole
            for index in range(children):
                child = spec.child(index, children, spec.solver)
                velocity = copy.deepcopy(time_slice(inner, child.start, child.length))
                if children > 1:
                    count = steps or aligned(velocity.pieces(), share)
                    child = replace(child, solver=replace(spec.solver, steps=count))
                refined.blocks.append(Block(velocity, child.solver))
                refined.specs.append(child)
        return refined

    # ---------------------------------------------------------------- maps

    def encode(
        self,
        z_0: Tensor,
        solver: Solvers = None,
        chunk: int = CHUNK,
        condition: Condition | None = None,
    ) -> Tensor:
        """z_0 → z_K, data to noise; (n, *shape) both. See :meth:`transport`."""
        return self.transport(z_0, solver=solver, chunk=chunk, condition=condition).z

    def decode(
        self,
        z_K: Tensor,
        solver: Solvers = None,
        chunk: int = CHUNK,
        condition: Condition | None = None,
    ) -> Tensor:
        """z_K → z_0, noise to data; (n, *shape) both. See :meth:`transport`."""
        return self.transport(z_K, True, solver, chunk, condition).z

    def sample(
        self,
        n: int,
        generator: torch.Generator | None = None,
        solver: Solvers = None,
        chunk: int = CHUNK,
        condition: Condition | None = None,
    ) -> Tensor:
        """Draws n samples z_0 (n, *shape) by decoding z_K ~ N(0, I).

        The noise comes from the generator in one piece, so the samples do not depend on ``chunk``
        with a fixed-grid solver.
        """
        if n < 1:
            raise FlowError(f"at least 1 sample must be asked for, not {n}")
        like = next(self.parameters(), torch.empty(0))
        device = like.device if generator is None else generator.device
        noise = torch.randn((n, *self.shape), generator=generator, device=device, dtype=like.dtype)
        return self.decode(noise.to(like.device), solver, chunk, condition)

    @torch.no_grad()
    def transport(
        self,
        z: Tensor,
        reverse: bool = False,
        solver: Solvers = None,
        chunk: int = CHUNK,
        condition: Condition | None = None,
    ) -> FlowTransport:
        """Carries samples through all blocks, a chunk at a time, so that memory stays flat.

        Args:
            z: (n, *shape), z_0 or with ``reverse`` z_K.
            reverse: noise to data.
            solver: for this call, in place of each block's own; a sequence has one a block.
            chunk: samples together in memory; adaptive solvers choose their steps for a chunk.
            condition: what the n samples are told, for a flow with classes, or with images beside.

        Raises:
            FlowError: z has another shape, or there are not as many solvers as blocks.
            SolveError: with the index of the block that failed.
        """
        self.check(z)
        check_labels(condition, z)
        totals = [[0.0, 0.0, 0.0] for _ in self.blocks]
        out = torch.empty_like(z)
        for start in range(0, z.shape[0], chunk):
            part, of = z[start : start + chunk], rows_of(condition, start, start + chunk)
            for index in self.order(reverse):
                moved = self.through(index, part, reverse, solver, condition=of)
                totals[index][0] += moved.nfe * part.shape[0]
                totals[index][1] += float((moved.z - part).double().square().sum())
                totals[index][2] += float(moved.z.double().square().sum())
                part = moved.z
            out[start : start + chunk] = part
        means = [[value / z.shape[0] for value in total] for total in totals]
        self.nfe = round(sum(mean[0] for mean in means))
        return FlowTransport(
            out,
            self.nfe,
            tuple(round(mean[0]) for mean in means),
            tuple(mean[1] for mean in means),
            tuple(mean[2] for mean in means),
        )

    @torch.no_grad()
    def trajectory(
        self,
        z: Tensor,
        reverse: bool = False,
        solver: Solvers = None,
        condition: Condition | None = None,
    ) -> Iterator[Tensor]:
        """Yields the samples at the start and after every block travelled, K + 1 in all."""
        self.check(z)
        yield z
        for index in self.order(reverse):
            z = self.through(index, z, reverse, solver, condition=condition).z
            yield z

    def order(self, reverse: bool) -> range:
        """Block indices in the direction travelled."""
        return range(len(self) - 1, -1, -1) if reverse else range(len(self))

    def through(
        self,
        index: int,
        z: Tensor,
        reverse: bool,
        solver: Solvers,
        divergence: Divergence | None = None,
        eps: Tensor | None = None,
        condition: Condition | None = None,
    ) -> Transport:
        """One block's transport, whose failure names the block."""
        if isinstance(solver, Sequence):
            if len(solver) != len(self):
                raise FlowError(f"{len(self)} blocks need as many solvers, not {len(solver)}")
            solver = solver[index]
        try:
            return self[index].transport(z, reverse, divergence, eps, solver, condition)
        except SolveError as failure:
            raise failure.in_block(index) from failure

    def check(self, z: Tensor) -> None:
        """Refuses samples of another shape, or none."""
        if tuple(z.shape[1:]) != self.shape or z.dim() == 0 or z.shape[0] < 1:
            raise FlowError(
                f"the flow takes samples (n, {', '.join(map(str, self.shape))}) with n ≥ 1, "
                f"found {tuple(z.shape)}"
            )

    # ---------------------------------------------------------------- configuration

    def to_config(self) -> dict[str, Any]:
        """A JSON-ready dictionary from which :meth:`from_config` builds the same structure.

        Weights are not in it: they are ``flow[k].state_dict()``, block by block.
        """
        return {
            "format": FORMAT,
            "shape": list(self.shape),
            "blocks": [spec.to_dict() for spec in self.specs],
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Flow:
        """Builds an untrained flow from :meth:`to_config`'s dictionary.

        Raises:
            FlowError: another format version, or keys that are unknown or missing.
        """
        if config.get("format") != FORMAT:
            raise FlowError(f"expected a flow of format {FORMAT}, found {config.get('format')!r}")
        if set(config) != {"format", "shape", "blocks"}:
            raise FlowError(f"expected the keys format, shape, blocks, found {sorted(config)}")
        return cls(config["shape"], [BlockSpec.from_dict(block) for block in config["blocks"]])
