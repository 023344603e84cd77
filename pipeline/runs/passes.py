"""Passes: which blocks a run trains, in which order, and which weights each starts from.

The first pass is Algorithm 1 of the paper: step sizes follow a schedule with a stopping rule, and
every block starts from the one before it. Later passes start from the blocks of an earlier one:

* reparameterize: new step sizes equalise the movements. Every block continues its training.
* refine: every block is split into c children of step h/c, which continue its training.
* add: new blocks follow those with a movement term. The free block is trained again.

Reference: JKO-iFlow, Algorithm 1, progressive reparameterization and refinement.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from flows.spec import BlockSpec
from pipeline.storage.records import to_json

#: entries of a block's row that logs and metrics leave out
_INTERNAL = ("stage", "pushed", "seed", "spec", "mean")


def require_inside(name: str) -> None:
    """Check a path that is relative to a run directory.

    Raises:
        ValueError: it may lead out of the directory.
    """
    parts = PurePosixPath(name).parts
    if not parts or name.startswith(("/", "~")) or ".." in parts or "\\" in name or "\0" in name:
        raise ValueError(f"the path {name!r} may lead out of the run; expected one inside")


@dataclass(frozen=True)
class SharedFile:
    """File of weights that several blocks of an export share, inside its directory."""

    file: str
    sha256: str

    def __post_init__(self) -> None:
        require_inside(self.file)


@dataclass(frozen=True)
class StoredBlock:
    """File of a finished block, with what is needed to load it.

    Attributes:
        file: path of its weights inside the run directory.
        sha256: of that file.
        h: JKO step size; None for a free block and under flow matching.
        gamma: Ornstein–Uhlenbeck time; None for a free block and under jko.
        objective: that the block was trained with.
        spec: the specification it is built from.
        mean: file of the mean that the block's weights are differences from (`shared_weights`);
            None for a block of its own.
    """

    file: str
    sha256: str
    h: float | None
    gamma: float | None
    objective: str
    spec: BlockSpec
    mean: SharedFile | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        require_inside(self.file)

    @property
    def step(self) -> float | None:
        """The step that the block took, h or γ; None if it is a free block."""
        return self.gamma if self.h is None else self.h


@dataclass(frozen=True)
class BlockRow(StoredBlock):
    """Record of a finished block in flow.json.

    Attributes:
        iterations: optimiser steps.
        lr: peak learning rate.
        movement: W2 movement √E‖T(z) − z‖²; None for a snapshot, as are `ter` and `terms`.
        ter: the ratio that the stopping rule compares, E‖T(z) − z‖² / E‖T(z)‖².
        terms: of the objective, nats per sample.
        seconds: of training.
        parameters: number of weights.
        stage: folder of the samples after the block, inside the run directory.
        pushed: number of those samples; None without them, and in older records.
        seed: that chose them.
        error: of a block that was regressed on a map: mean squared distance to it per dimension,
            by direction.
    """

    iterations: int
    lr: float
    movement: float | None
    ter: float | None
    terms: dict[str, float] | None
    seconds: float
    parameters: int
    stage: str
    pushed: int | None = None
    seed: int | None = None
    error: dict[str, float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_inside(self.stage)

    def report(self) -> dict[str, Any]:
        """Return the entries for logs and metrics; steps are rounded to 12 digits.

        flow.json keeps all digits, because later passes compute with them.
        """
        plain: dict[str, Any] = to_json(self)
        for key in ("h", "gamma"):
            if plain[key] is not None:
                plain[key] = float(f"{plain[key]:.12g}")
        return {key: value for key, value in plain.items() if key not in _INTERNAL}


@dataclass(frozen=True)
class PassSummary:
    """Result of a finished pass.

    Attributes:
        movement: of each block.
        spread: standard deviation over mean of the movements of the blocks with a step.
        objective: E[½‖z_K‖²] + Σ_k (neg_log_det_k + movement_k), nats. Passes with other step
            sizes weigh the movements differently: compare their NLL.
        nll: estimate of E[−log p(z_0)], nats.
        nll_per_dim: nll / D.
    """

    movement: list[float]
    spread: float
    objective: float
    nll: float
    nll_per_dim: float


@dataclass(frozen=True)
class Pass:
    """One training of all blocks of a flow: its plan, and the rows of the blocks so far.

    Attributes:
        kind: ordinary, reparameterize, refine or add; a block source may have a kind of its own.
        h: planned step sizes of the blocks with a movement term; empty under lfm.
        free: whether a free block follows them.
        tolerance: of the rule `stopped`, which may end the pass early; None if it may not.
        iterations: optimiser steps of each block, the free one included.
        substeps: sub-intervals S of each block's training grid.
        lr: peak learning rate of each block.
        base: number of the pass it starts from; None for the first.
        parts: children that each block with a movement term of the base is split into.
        own: whether blocks start from their own weights in the base, not from the block before.
        kept: number of first blocks that are taken over unchanged from the pass before.
        reparameterized: number of reparameterizations up to this pass.
        recipe: section train and the sections of the objective that it is trained with.
        objective: of its blocks. Flow matching is lfm with a free block alone.
        gamma: planned times of the blocks before the free one; empty under jko.
        blocks: a row for each finished block, the kept ones included.
        complete: whether all blocks are finished.
        summary: result of the pass; None until it is complete.
    """

    kind: str
    h: list[float]
    free: bool
    tolerance: float | None
    iterations: list[int]
    substeps: list[int]
    lr: list[float]
    base: int | None = None
    parts: int = 1
    own: bool = False
    kept: int = 0
    reparameterized: int = 0
    recipe: dict[str, Any] = dataclasses.field(default_factory=dict)
    objective: str = "jko"
    gamma: list[float] = dataclasses.field(default_factory=list)
    blocks: tuple[BlockRow, ...] = ()
    complete: bool = False
    summary: PassSummary | None = None

    @property
    def steps(self) -> list[float]:
        """The planned steps of the blocks before the free one: h_k, or γ_k under lfm."""
        return self.h or self.gamma

    def step(self, index: int) -> float | None:
        """Return the planned step (h or γ) of the next block; None if it is the free block."""
        return None if index >= len(self.steps) or self.stopped else self.steps[index]

    def with_block(self, row: BlockRow) -> Pass:
        """Return the pass with one more finished block, which may complete it."""
        grown = dataclasses.replace(self, blocks=(*self.blocks, row))
        return dataclasses.replace(grown, complete=row.step is None or grown.exhausted)

    @property
    def stopped(self) -> bool:
        """Whether the last finished block hardly moved the samples.

        The rule is Ter(k) < tolerance · min(1, s)², where s is the step h of jko or γ of lfm. A
        short step moves samples by O(s), however far they are from the end.
        """
        if self.tolerance is None or not self.blocks:
            return False
        last = self.blocks[-1]
        assert last.ter is not None
        scale = 1.0 if last.step is None else min(1.0, last.step) ** 2
        return last.ter < self.tolerance * scale

    @property
    def exhausted(self) -> bool:
        """Whether no block is left to train, and no free block is wanted."""
        return not self.free and (self.stopped or len(self.blocks) >= len(self.steps))

    def parent(self, index: int) -> tuple[int, int, int]:
        """Return the block of the base that a block starts from, its part of it, and the parts."""
        if index >= len(self.steps):
            return len(self.steps) // self.parts, 0, 1
        return index // self.parts, index % self.parts, self.parts


def splits(passes: Sequence[Pass], number: int) -> int:
    """Count the children that a run has split each of its first blocks into, up to a pass."""
    last = passes[number]
    split = last.parts
    while last.base is not None:
        last = passes[last.base]
        split *= last.parts
    return split


def labels(passes: Sequence[Pass]) -> list[str]:
    """Return names of passes for plots, as in the paper: Iter 1, Iter 2, …, r-Iter 1, …."""
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


def summarise(rows: Sequence[BlockRow], dim: int) -> PassSummary:
    """Sum up a finished pass of samples of D dimensions; all terms are of the same samples."""
    terms = [row.terms for row in rows if row.terms is not None]
    movements = [row.movement for row in rows if row.movement is not None]
    assert len(terms) == len(movements) == len(rows)
    stepped = [m for m, row in zip(movements, rows, strict=True) if row.step is not None]
    nll = terms[-1]["potential"] + sum(t["neg_log_det"] for t in terms)
    objective = nll + sum(t.get("movement", 0.0) for t in terms)
    nll += dim / 2 * math.log(2 * math.pi)
    return PassSummary(movements, spread(stepped), objective, nll, nll / dim)


def spread(movements: Sequence[float]) -> float:
    """Return standard deviation over mean: 0 if all blocks move the samples equally far."""
    mean = float(np.mean(movements)) if movements else 0.0
    return float(np.std(movements)) / mean if mean > 0 else 0.0
