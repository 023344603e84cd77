"""Passes: which blocks a run trains, in which order, and what each starts from.

A pass is one training of all its blocks. The first is Algorithm 1 of the paper: step sizes by a
schedule, a stopping rule, every block started from the one before it. Later passes take the
finished blocks of a pass before them:

reparameterize  new step sizes, which even out the movements; every block trains on
refine          every block split into c children of step h/c, which train on
add             further blocks after those with a movement term; the free block is trained anew

`pipeline.training.planner` decides which comes next.

Reference: JKO-iFlow, Algorithm 1, progressive reparameterization and refinement.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.errors import UserError

Row = dict[str, Any]


@dataclass(frozen=True)
class Pass:
    """One training of all blocks of a flow: its plan, and the rows of the blocks so far.

    Attributes:
        kind: ordinary, reparameterize, refine, add or distill.
        h: planned step sizes of the blocks with a movement term; empty under lfm.
        free: whether a free block follows them.
        tolerance: the pass ends before all of `h` when Ter(k) falls below it; None if it may not.
        iterations: optimiser steps of each block, the free one included.
        substeps: sub-intervals S of each block while it trains, likewise.
        base: number of the pass it starts from; None for the first.
        parts: children that each block with a movement term of the base is split into.
        own: blocks start from their own weights in the base, not from the block before them.
        kept: first blocks that are taken over from the pass before as they are.
        reparameterized: reparameterizations up to this pass.
        recipe: the train section and the section of the objective that it is trained with.
        objective: of its blocks, jko, lfm (flow matching is lfm with a free block alone) or
            distill, whose steps are the sums of those of the blocks that were merged.
        gamma: lfm: planned times of the blocks before the free one.
        lr: peak learning rate of each block.
        blocks: a row for each finished block, the kept ones included.
        complete: whether all blocks are finished.
        summary: once complete: movements, their spread, the objective, the NLL.
    """

    kind: str
    h: list[float]
    free: bool
    tolerance: float | None
    iterations: list[int]
    substeps: list[int]
    base: int | None = None
    parts: int = 1
    own: bool = False
    kept: int = 0
    reparameterized: int = 0
    recipe: dict[str, Any] = field(default_factory=dict)
    objective: str = "jko"
    gamma: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    blocks: list[Row] = field(default_factory=list)
    complete: bool = False
    summary: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Pass:
        """From an entry of flow.json.

        Raises:
            UserError: keys that this version does not know, or some missing.
        """
        try:
            return cls(**plain)
        except TypeError as error:
            raise UserError(f"a pass in flow.json cannot be read ({error})") from error

    @property
    def steps(self) -> list[float]:
        """What is planned for the blocks before the free one: h_k, or under lfm γ_k."""
        return self.h or self.gamma

    def step(self, index: int) -> float | None:
        """Step (h or γ) of the next block; None if it is the free block."""
        return None if index >= len(self.steps) or self.stopped else self.steps[index]

    def with_row(self, row: Row) -> Pass:
        """The pass with one more finished block, which may complete it."""
        grown = dataclasses.replace(self, blocks=[*self.blocks, row])
        return dataclasses.replace(grown, complete=step_of(row) is None or grown.exhausted)

    @property
    def stopped(self) -> bool:
        """Whether the last finished block hardly moved the samples: Ter(k) < tolerance.

        A JKO step solves a problem to its end, but the diffusion moves samples by O(γ) for short
        times γ however far they have to go: under lfm Ter(k) / min(1, γ)² is compared.
        """
        if self.tolerance is None or not self.blocks:
            return False
        last = self.blocks[-1]
        gamma = last.get("gamma")
        scale = 1.0 if gamma is None else min(1.0, gamma) ** 2
        return bool(last["ter"] < self.tolerance * scale)

    @property
    def exhausted(self) -> bool:
        """Whether no block is left to train, and no free block is wanted."""
        return not self.free and (self.stopped or len(self.blocks) >= len(self.steps))

    def parent(self, index: int) -> tuple[int, int, int]:
        """Block of the base that a block starts from, and which child of how many it is."""
        if index >= len(self.steps):
            return len(self.steps) // self.parts, 0, 1
        return index // self.parts, index % self.parts, self.parts


def step_of(row: Row) -> float | None:
    """The step that a finished block took, h or γ; None if it is a free block."""
    step: float | None = row["h"] if row["h"] is not None else row.get("gamma")
    return step


def readable(row: Row) -> Row:
    """The row for logs and metrics: steps without the last digits, where rounding errors show.

    flow.json keeps them, for what is computed from it.
    """
    steps = {key: row[key] for key in ("h", "gamma") if row.get(key) is not None}
    return {**row, **{key: float(f"{value:.12g}") for key, value in steps.items()}}


def labels(passes: Sequence[Pass]) -> list[str]:
    """Names of passes for plots, as in the paper: Iter 1, Iter 2, …, r-Iter 1, …."""
    names, refined, count = [], False, 0
    for entry in passes:
        if entry.kind == "refine" and not refined:
            refined, count = True, 0
        if entry.kind == "add":
            names.append(f"{len(entry.steps) - entry.kept} more")
        else:
            count += 1
            names.append(f"r-Iter {count}" if refined else f"Iter {count}")
    return names


def summarise(rows: Sequence[Row], dim: int) -> dict[str, Any]:
    """What a pass came to.

    `nll` estimates E[−log p(z_0)]; `objective` is E[½‖z_K‖²] + Σ_k (neg_log_det_k + movement_k),
    the price of the whole way. Passes with other step sizes weigh the way differently: compare
    their NLL.

    Args:
        rows: of all blocks; each holds its terms on the same samples.
        dim: D.

    Returns:
        movement (one a block), spread (standard deviation over mean of the movements with a
        step size), objective and nll in nats, nll_per_dim.
    """
    terms = [row["terms"] for row in rows]
    stepped = [row["movement"] for row in rows if step_of(row) is not None]
    nll = terms[-1]["potential"] + sum(t["neg_log_det"] for t in terms)
    objective = nll + sum(t.get("movement", 0.0) for t in terms)
    nll += dim / 2 * math.log(2 * math.pi)
    return {
        "movement": [row["movement"] for row in rows],
        "spread": spread(stepped),
        "objective": objective,
        "nll": nll,
        "nll_per_dim": nll / dim,
    }


def spread(movements: Sequence[float]) -> float:
    """Standard deviation over mean: 0 if all blocks move the samples equally far."""
    mean = float(np.mean(movements)) if movements else 0.0
    return float(np.std(movements)) / mean if mean > 0 else 0.0
