"""Refinement: blocks split into children with smaller step sizes.

Reference: JKO-iFlow, refinement of the trajectory.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace

from flows.block import Block
from flows.errors import FlowError
from flows.flow import Flow
from flows.networks.piecewise import TimeSlice, aligned_steps, time_slice
from flows.spec import BlockSpec


def split_block(
    spec: BlockSpec, block: Block, c: int, steps: int | None = None
) -> list[tuple[BlockSpec, Block]]:
    """Split a block into c ≥ 1 children that together are the same map, data side first.

    Child j follows v on [j/c, (j+1)/c] with the step h/c or γ/c, so it starts on its parent's
    trajectory. The children have copies of the weights and can be trained separately. A child has
    ``steps`` sub-intervals. By default these are ⌈S/c⌉, or the next larger number whose grid has a
    node at every switch between networks. A free block has no step to divide, so it has a single
    child with the block's solver.

    Raises:
        FlowError: c < 1, or the grid of ``steps`` has no node at a switch between networks.
    """
    if c < 1:
        raise FlowError(f"a block must be split into at least 1, not {c}")
    count = 1 if spec.step is None else c
    whole = block.velocity.inner if isinstance(block.velocity, TimeSlice) else block.velocity
    children = []
    for index in range(count):
        child = spec.child(index, count)
        velocity = copy.deepcopy(time_slice(whole, child.start, child.length))
        if count > 1:
            least = math.ceil(spec.solver.steps / count)
            share = steps or aligned_steps(velocity.smooth_pieces(), least)
            child = replace(child, solver=replace(spec.solver, steps=share))
        children.append((child, Block(velocity, child.solver)))
    return children


def refine_blocks(flow: Flow, c: int, steps: int | None = None) -> Flow:
    """Split every block of a flow into c children; see :func:`split_block`."""
    pairs = zip(flow.specs, flow, strict=True)
    children = [child for spec, block in pairs for child in split_block(spec, block, c, steps)]
    return Flow.from_blocks(flow.shape, children)
