"""Parts of a flow: the interval [a, b] of its time, in which block k covers [k, k + 1]."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from flows.block import Block
from flows.errors import FlowError
from flows.flow import Flow
from flows.networks.piecewise import ROUNDING, aligned_steps, time_slice
from flows.solving.solver import SolverConfig


def part_of(
    flow: Flow, solvers: Sequence[SolverConfig], start: float, stop: float
) -> tuple[Flow, list[SolverConfig]]:
    """Return the part [start, stop] of a flow's time, and the solvers of its blocks.

    The time of K blocks is [0, K], with the data at 0 and the noise at K. The result shares the
    weights. A part of a block has the share of the block's solver steps, rounded up.

    Raises:
        FlowError: the interval is empty or leaves [0, K], or there is not one solver per block.
    """
    if len(solvers) != len(flow):
        raise FlowError(f"the flow has {len(flow)} blocks and {len(solvers)} solvers")
    if not 0 <= start < stop <= len(flow):
        raise FlowError(
            f"the part [{start:g}, {stop:g}] of a flow is invalid; expected an interval in "
            f"[0, {len(flow)}]"
        )
    specs, blocks, chosen = [], [], []
    for index, (spec, block, solver) in enumerate(zip(flow.specs, flow, solvers, strict=True)):
        low, high = max(start - index, 0.0), min(stop - index, 1.0)
        length = high - low
        if length <= ROUNDING:
            continue
        if length < 1:
            velocity = time_slice(block.velocity, low, length)
            if not solver.adaptive:
                steps = max(1, math.ceil(solver.steps * length - ROUNDING))
                steps = aligned_steps(velocity.smooth_pieces(), steps)
                solver = dataclasses.replace(solver, steps=steps)
            block = Block(velocity, solver)
        specs.append(spec)
        blocks.append(block)
        chosen.append(solver)
    return Flow.from_blocks(flow.shape, zip(specs, blocks, strict=True)), chosen
