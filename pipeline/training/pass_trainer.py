"""Trains one pass: every block in turn, each committed when it is finished.

While a block trains, no other block is in memory.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from flows.objectives.schedule import stopping_ratio
from pipeline.runs.directory import block_file, checkpoint_file, write_manifest
from pipeline.runs.manifest import Manifest
from pipeline.runs.movement_plot import plot_movement
from pipeline.runs.passes import BlockRow, Pass, summarise
from pipeline.runs.snapshots import Snapshot, add_snapshot, snapshot_file
from pipeline.runtime.console import say
from pipeline.runtime.distributed import broadcast_decision
from pipeline.storage import atomic
from pipeline.storage.records import to_json
from pipeline.storage.training_log import TrainingLog
from pipeline.training.block_loop import Limits, Place, optimise
from pipeline.training.block_source import BlockSource, TrainingContext
from pipeline.training.block_trainer import BlockTrainer
from pipeline.training.diagnostics import Diagnostics, compares_grids, overfits_grid
from pipeline.training.previews import Previews
from pipeline.training.stages import stage_file


class PassTrainer:
    """Trainer of passes; it commits flow.json after every block.

    Args:
        context: of the training.
        manifest: of the run so far; it has no passes before the first block is finished.
        blocks: source of initial weights and samples.

    Attributes:
        passes: of the run; it grows.
        trained: number of blocks that this trainer has finished.
        limits: of the training.
    """

    def __init__(self, context: TrainingContext, manifest: Manifest, blocks: BlockSource) -> None:
        self.context, self.blocks = context, blocks
        self.config, self.folder = context.config, context.folder
        self.accelerator = context.accelerator
        self._manifest = manifest
        self.previews = Previews(context, manifest)
        self.passes = list(manifest.passes)
        self.limits = Limits(self.config.train.max_minutes)
        self.trained = 0

    @property
    def manifest(self) -> Manifest:
        """Manifest with the passes so far."""
        return self._manifest.with_passes(self.passes)

    @property
    def current(self) -> Pass:
        """The pass in training."""
        return self.passes[-1]

    @property
    def number(self) -> int:
        """Number of the pass in training, from 0."""
        return len(self.passes) - 1

    def train(self, plan: Pass, log: TrainingLog) -> bool:
        """Train a pass to its end, or until `train.max_minutes`.

        Returns:
            whether the pass is complete.
        """
        if not self.passes or plan is not self.current:
            self.passes.append(plan)
            if self.number:  # flow.json appears with the first finished block
                self._commit()
        log.number = self.number
        while not self.current.complete:
            if not self._train_block(log):
                return False
        return True

    def _train_block(self, log: TrainingLog) -> bool:
        """Train and commit the next block; return False when the time is up."""
        index = len(self.current.blocks)
        stage = self.blocks.samples(self.passes, index)
        spec, block = self.blocks.initial(self.passes, index)
        recipe = dataclasses.replace(
            self.config.train,
            iterations=self.current.iterations[index],
            lr=self.current.lr[index],
        )
        trainer = BlockTrainer(
            block,
            spec,
            stage,
            recipe,
            self.config.jko or self.config.regression,
            self.accelerator,
            self.number,
            self.blocks.regression,
        )
        trainer.clock = self.context.clock
        if not self._optimise(trainer, log):
            return False
        file, sha256 = self._commit_block(trainer)
        measurement = self.blocks.finish(self.passes, trainer, sha256, log)
        self._record(trainer, file, sha256, measurement, log)
        return True

    def _commit_block(self, trainer: BlockTrainer) -> tuple[str, str]:
        """Write the trained block; return its file and sha256."""
        block, file = trainer.finish(), block_file(trainer.index, self.number)
        if self.accelerator.is_main_process:
            atomic.write_tensors(self.folder / file, block.state_dict())
        self.accelerator.wait_for_everyone()
        return file, atomic.sha256_file(self.folder / file)

    def _optimise(self, trainer: BlockTrainer, log: TrainingLog) -> bool:
        """Run the optimiser to its end; return False when the time is up."""
        snapshot_every = self.config.fm.snapshot_every if self.config.fm is not None else 0
        place = self._place(trainer)

        def after_step() -> bool:
            overfit = compares_grids(trainer) and self._has_overfit(trainer, log)
            if overfit or self.previews.due(trainer):  # before a checkpoint, which counts as drawn
                self.previews.draw(self.current, trainer, log, place.before + trainer.done)
            if not overfit and snapshot_every and trainer.done % snapshot_every == 0:
                save_snapshot(self.folder, trainer)
            return overfit

        return optimise(trainer, log, place, self.limits, self.context.progress, after_step)

    def _place(self, trainer: BlockTrainer) -> Place:
        """Return the place of the block in training."""
        index, step = trainer.index, trainer.spec.step
        trained = (row for each in self.passes for row in each.blocks[each.kept :])
        before = sum(row.iterations for row in trained)
        symbol = "γ" if trainer.spec.h is None else "h"
        return Place(
            f"pass {self.number} block {index}" if self.number else f"block {index}",
            "free" if step is None else f"{symbol}={step:.3g}",
            self.folder / checkpoint_file(index, self.number),
            before,
            sum(self.current.iterations[index:]),
            self.manifest,
        )

    def _has_overfit(self, trainer: BlockTrainer, log: TrainingLog) -> bool:
        """Stop a block that overfits the error of its training grid, at its last sound weights."""
        sampler = self.config.sampler.of_block(trainer.index)
        if not broadcast_decision(self.accelerator, overfits_grid(trainer, sampler)):
            return False
        trainer.stop()
        if self.accelerator.is_main_process:
            event = "stopped: the block overfits its training grid"
            log.write({"block": trainer.index, "step": trainer.done, "event": event})
            say(
                f"block {trainer.index} overfits the error of its training grid at step "
                f"{trainer.done}; it ends with the weights of the comparison before"
            )
        return True

    def _record(
        self,
        trainer: BlockTrainer,
        file: str,
        sha256: str,
        measurement: Diagnostics,
        log: TrainingLog,
    ) -> None:
        """Enter the finished block into flow.json; from here on it counts."""
        index, spec, moved = trainer.index, trainer.spec, measurement.moved
        row = BlockRow(
            file,
            sha256,
            spec.h,
            spec.gamma,
            spec.objective,
            spec,
            iterations=trainer.done,
            lr=trainer.lr,
            movement=moved["movement"],
            ter=stopping_ratio(moved["squared_movement"], moved["squared_norm"]),
            terms=measurement.terms,
            seconds=round(trainer.seconds, 3),
            parameters=sum(p.numel() for p in trainer.parameters),
            stage=stage_file(index + 1, self.number),
            pushed=int(moved["count"]) if "count" in moved else None,
            seed=self.config.train.seed if "count" in moved else None,
            error=measurement.error,
        )
        self.passes[-1] = self.current.with_block(row)
        self.trained += 1
        if self.current.complete:
            self._summarise(trainer.block.velocity.dim, log)
        if self.accelerator.is_main_process:
            event = {"block": index, "step": trainer.done, "event": "finished"}
            log.write({**event, **row.report()})
            log.sync()
        self._commit()
        if self.accelerator.is_main_process:
            (self.folder / checkpoint_file(index, self.number)).unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()

    def _summarise(self, dim: int, log: TrainingLog) -> None:
        """Log the summary of a finished pass, and plot the movements of all passes."""
        summary = summarise(self.current.blocks, dim)
        self.passes[-1] = dataclasses.replace(self.current, summary=summary)
        if self.accelerator.is_main_process:
            event = {"block": len(self.current.blocks), "event": "pass finished"}
            log.write({**event, "kind": self.current.kind, **to_json(summary)})
            plot_movement(self.manifest, self.folder / "samples" / "movement.png")

    def restore_stages(self) -> None:
        """Make the samples again that the last pass was trained on, where they are lost."""
        self.context.first_stage()
        rows = self.current.blocks if self.passes else ()
        count = len(rows)
        if self.blocks.regression is not None:  # of pairs, whose second half is the next stage
            count += not self.passes or not self.current.complete
        elif rows and rows[-1].step is not None:
            count += 1  # the samples after the last block, which is not free
        for index in range(count):
            self.blocks.samples(self.passes, index)

    def _commit(self) -> None:
        if self.accelerator.is_main_process:
            write_manifest(self.folder, self.manifest)

    def tidy(self) -> None:
        """Remove what a finished run does not need: checkpoints, and stages of earlier passes."""
        if not self.passes or not self.accelerator.is_main_process:
            return
        for checkpoint in (self.folder / "checkpoints").glob("*.safetensors"):
            checkpoint.unlink()
        used = {row.stage for row in self.current.blocks} | {stage_file(0)}
        for stage in list((self.folder / "stages").glob("**/stage-*")):
            if stage.is_dir() and stage.relative_to(self.folder).as_posix() not in used:
                # the manifest goes first, so that a half-removed stage does not look complete
                (stage / "manifest.json").unlink(missing_ok=True)
                shutil.rmtree(stage)


def save_snapshot(folder: Path, trainer: BlockTrainer) -> None:
    """Commit the averaged weights of a block in training; all ranks call it, rank 0 writes.

    A resumed training may come to the same step again, with the same weights.

    Args:
        folder: the run directory.
        trainer: of the block.
    """
    weights, step, file = trainer.weights(), trainer.done, snapshot_file(trainer.done)
    if not trainer.accelerator.is_main_process:
        return
    sha256 = atomic.write_tensors(folder / file, weights)
    seen, seconds = step * trainer.recipe.batch_size, round(trainer.seconds, 3)
    add_snapshot(folder, Snapshot(file, sha256, step, seen, seconds))
