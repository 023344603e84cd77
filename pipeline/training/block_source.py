"""Block sources: where the blocks of a pass get their initial weights and training samples.

`TrainedBlocks` is the source of ordinary passes: every block trains on the samples that the blocks
before it have moved.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from accelerate import Accelerator

from flows.block import Block
from flows.freezing import can_freeze, freeze_block
from flows.net2net import becomes_several, transform_block, widening_factor
from flows.refinement import split_block
from flows.spec import BlockSpec, build_block
from pipeline.config.schema import Config
from pipeline.runs.manifest import WarmStartRecord
from pipeline.runs.passes import Pass, StoredBlock
from pipeline.runs.run import load_block
from pipeline.runs.zoo import locate
from pipeline.runtime.console import Progress
from pipeline.runtime.distributed import errors_on_all_ranks
from pipeline.runtime.rng import generator
from pipeline.storage.shards.reader import StoreReader
from pipeline.storage.training_log import TrainingLog
from pipeline.training.batches.matching_loss import Regression
from pipeline.training.block_trainer import BlockTrainer
from pipeline.training.diagnostics import Diagnostics, check_grid, measure
from pipeline.training.sources import SampleSource
from pipeline.training.stages import has_stage, next_stage, stage_file, stage_index
from pipeline.training.warm_start import initial_row


@dataclass(frozen=True)
class TrainingContext:
    """What all parts of a training share.

    Attributes:
        config: the configuration.
        folder: the run directory.
        samples: source of the samples of stage 0.
        accelerator: device and ranks.
        progress: wraps loops.
        clock: of the seconds of optimiser steps.
    """

    config: Config
    folder: Path
    samples: SampleSource
    accelerator: Accelerator
    progress: Progress
    clock: Callable[[], float] = time.perf_counter

    def first_stage(self) -> StoreReader:
        """Open stage 0; it is made where it is missing."""
        return self.samples.first_stage(self.folder, self.config, self.accelerator)

    def verify_samples(self) -> None:
        """Check that stage 0, where it exists, holds the samples of the source.

        Raises:
            UserError: it holds others.
        """
        if has_stage(self.folder, 0):
            self.first_stage()


class BlockSource(Protocol):
    """Source of the blocks of a pass.

    In every method `passes` are the passes of the run, the last of them in training, and `index`
    is that of the next block.

    Attributes:
        regression: loss of a distillation; None takes the objective jko, lfm or fm.
    """

    regression: Regression | None

    def initial(self, passes: Sequence[Pass], index: int) -> tuple[BlockSpec, Block]:
        """Build the block with its initial weights."""

    def samples(self, passes: Sequence[Pass], index: int) -> StoreReader:
        """Open the stage that the block trains on."""

    def finish(
        self, passes: Sequence[Pass], trainer: BlockTrainer, sha256: str, log: TrainingLog
    ) -> Diagnostics:
        """Measure a finished block, and prepare the samples of the next one.

        Args:
            passes: see the class.
            trainer: of the block, finished.
            sha256: of the block's file.
            log: of the run.

        Raises:
            JkoflowError: the block fails its checks and is discarded.
        """


class TrainedBlocks:
    """Blocks that train on the samples which the blocks before them have moved.

    A block starts from its parent in an earlier pass. Without a parent it starts from its
    counterpart in the run given by `--init-from`, from the block before it, or randomly.

    Args:
        context: of the training.
        warm_start: record of the run given by `--init-from`; None for none.
    """

    def __init__(self, context: TrainingContext, warm_start: WarmStartRecord | None) -> None:
        self.context, self.warm_start = context, warm_start
        self.regression: Regression | None = None
        self._stage: StoreReader | None = None
        self._number = 0  # of the pass that the stage belongs to

    def initial(self, passes: Sequence[Pass], index: int) -> tuple[BlockSpec, Block]:
        """Build the block with its initial weights."""
        plan, config, shape = passes[-1], self.context.config, self.context.samples.shape
        step = plan.step(index)
        if plan.own:
            assert plan.base is not None
            parent, part, parts = plan.parent(index)
            row = passes[plan.base].blocks[parent]
            children = split_block(*load_block(self.context.folder, row, shape), parts)
            spec, block = children[part]
            return dataclasses.replace(spec, h=step), block
        spec = self._spec(plan, index)
        salt = [len(passes) - 1] if len(passes) > 1 else []
        source = generator(config.train.seed, "weights", index, *salt)
        folder, start = self._start(plan, index, free=step is None)
        if start is not None:
            before, block = load_block(folder, start, shape)
            if spec.velocity.autonomous and can_freeze(before.velocity):
                block, before = self._freeze(plan, index, block, before)
            if _extends(before, spec):
                spec = dataclasses.replace(
                    spec, start=before.start, length=before.length, skip=before.skip
                )
                block = transform_block(block, before, spec, source)
                block.solver = spec.solver
                return spec, block
        return spec, build_block(spec, shape, source)

    def samples(self, passes: Sequence[Pass], index: int) -> StoreReader:
        """Open the stage; push samples through finished blocks where stages are lost."""
        context, number, stage = self.context, len(passes) - 1, self._stage
        if stage is None or number != self._number:
            stage = context.first_stage()
        for earlier in range(stage_index(stage), index):
            row = passes[-1].blocks[earlier]
            block = load_block(context.folder, row, context.samples.shape)[1]
            stage = self._push(
                passes[-1], stage, block, row.sha256, row.stage, row.pushed, row.seed
            )
        self._stage, self._number = stage, number
        return stage

    def finish(
        self, passes: Sequence[Pass], trainer: BlockTrainer, sha256: str, log: TrainingLog
    ) -> Diagnostics:
        """Measure a finished block, and push the samples through it."""
        solver = self.context.config.sampler.of_block(trainer.index)
        progress = self.context.progress
        measured = measure(trainer, solver, progress)
        moved: Mapping[str, float] = measured.moved
        if passes[-1].step(trainer.index) is not None:  # no block follows a free one
            name = stage_file(trainer.index + 1, len(passes) - 1)
            self._stage = self._push(passes[-1], trainer.stage, trainer.block, sha256, name)
            moved = self._stage.manifest
        with errors_on_all_ranks(self.context.accelerator):
            if self.context.accelerator.is_main_process:
                check_grid(trainer, solver, log, progress)
        return dataclasses.replace(measured, moved=moved)

    def _push(
        self,
        plan: Pass,
        stage: StoreReader,
        block: Block,
        sha256: str,
        name: str,
        pushed: int | None = None,
        seed: int | None = None,
    ) -> StoreReader:
        """Return the stage after a block; it is made where it is missing.

        A stage that is made again has the samples of the first time, `pushed` by their `seed`.
        """
        context, index = self.context, stage_index(stage)
        iterations = plan.iterations[index + 1 :] or plan.iterations[index:]
        block.to(context.accelerator.device)
        return next_stage(
            context.folder,
            context.config,
            stage,
            block,
            sha256,
            context.accelerator,
            context.progress,
            context.folder / name,
            pushed or max(iterations) * context.config.train.batch_size,
            context.config.train.seed if seed is None else seed,
        )

    def _spec(self, plan: Pass, index: int) -> BlockSpec:
        """Return the specification of a block that continues no block of an earlier pass."""
        config, step = self.context.config, plan.step(index)
        if config.jko is None:  # the training integrates nothing
            solver = config.sampler.of_block(index)
            return BlockSpec(config.velocity, solver, objective="lfm", gamma=step)
        solver = config.jko.solver.of_block(index)
        solver = dataclasses.replace(solver, steps=plan.substeps[index])
        return BlockSpec(config.velocity, solver, h=step)

    def _start(self, plan: Pass, index: int, free: bool) -> tuple[Path, StoredBlock | None]:
        """Return the run and the block that the next one starts from; None for random weights."""
        train = self.context.config.train
        if train.init_from is not None and self.warm_start is not None:
            autonomous = self.context.config.velocity.autonomous
            row = initial_row(self.warm_start, index, free, autonomous)
            if row is not None:
                return locate(train.init_from), row
        warm = train.warm_start and index > 0
        return self.context.folder, plan.blocks[index - 1] if warm else None

    def _freeze(
        self, plan: Pass, index: int, block: Block, before: BlockSpec
    ) -> tuple[Block, BlockSpec]:
        """Freeze a block of the other run at the time of an autonomous block."""
        start = self.warm_start
        assert start is not None
        if not start.shares_time(True):
            return freeze_block(block, before)
        count = len(plan.steps) + plan.free
        interval = index / count, (index + 1) / count
        return freeze_block(block, before, *interval, from_linear=start.from_linear)


def _extends(before: BlockSpec, spec: BlockSpec) -> bool:
    """Whether a block can start from another one: the same network, a wider one or several."""
    wanted = spec.velocity
    same = dataclasses.replace(before.velocity, classes=wanted.classes, width=wanted.width)
    if becomes_several(before.velocity, wanted):
        same = dataclasses.replace(same, nets=wanted.nets)
    return same == wanted and widening_factor(before.velocity, wanted) is not None
