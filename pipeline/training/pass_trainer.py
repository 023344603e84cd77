"""Trains one pass: every block in turn, each committed when it is finished.

While a block trains, no other block is in memory.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from flows.block import Block
from flows.net2net import becomes_several, transform_block, widening_factor
from flows.objectives.schedule import stopping_ratio
from flows.refinement import split_block
from flows.spec import BlockSpec, build_block
from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.runs.directory import block_file
from pipeline.runs.manifest import compose, passes_of
from pipeline.runs.movement_plot import plot_movement
from pipeline.runs.passes import Pass, Row, readable, summarise
from pipeline.runs.run import load_block
from pipeline.runs.snapshots import _LIST, _place, snapshots_of
from pipeline.runs.zoo import locate
from pipeline.runtime.console import Progress
from pipeline.runtime.distributed import broadcast_decision, errors_on_all_ranks
from pipeline.runtime.rng import generator
from pipeline.storage import atomic
from pipeline.storage.shards import StoreReader
from pipeline.storage.training_log import Journal
from pipeline.training.block_trainer import BlockTrainer
from pipeline.training.diagnostics import check_grid, measure
from pipeline.training.sources import Source, counts_of
from pipeline.training.stages import next_stage, stage_file
from pipeline.training.warm_start import INITIAL, initial_row, open_initial


class Trainer:
    """Trains passes; every finished block is committed.

    Args:
        config: the configuration.
        folder: the run directory.
        source: where the samples come from.
        accelerator: device and processes.
        progress: wraps loops.
        manifest: flow.json of the run so far; None if no block is finished.

    Attributes:
        passes: of the run, grows.
        trained: blocks finished so far.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        source: Source,
        accelerator: Accelerator,
        progress: Progress,
        manifest: dict[str, Any] | None,
    ) -> None:
        self.config, self.folder, self.source = config, folder, source
        self.accelerator, self.progress = accelerator, progress
        self.passes = passes_of(manifest) if manifest else []
        self.deadline = time.monotonic() + 60 * config.train.max_minutes
        self.trained = 0
        made = ("format", "shape", "passes", "pass", "complete", "flow", "blocks", "exported")
        self.about = {k: v for k, v in (manifest or {}).items() if k not in made}
        if manifest is None:
            self.about = {"name": config.name, **source.manifest()}
            if config.velocity.classes and source.labels is not None:
                counts = counts_of(source.labels, config.velocity.classes)
                self.about["classes"] = {"counts": counts}
        else:
            self._require_same_scale(source.manifest())
        other = config.train.init_from
        if other is not None and self.about.get("init_from", {}).get("run") != other:
            kept = open_initial(other, config.velocity, tuple(source.shape))
            begun = folder / INITIAL
            if manifest is None and begun.is_file():  # stopped before its first block
                kept = atomic.read_json(begun, "record of the weights to start from")
            self.about["init_from"] = kept

    def _require_same_scale(self, now: dict[str, Any]) -> None:
        """Refuse latents that were standardised otherwise than those of the blocks so far."""
        key = "standardisation"
        if key in now and key in self.about and now[key] != self.about[key]:
            raise UserError(
                f"the latents in the cache are standardised otherwise than those that the run at "
                f"{self.folder} was trained on; encode with the images, limit and autoencoder of "
                "that time, or train elsewhere with --run"
            )

    @property
    def current(self) -> Pass:
        """The pass in training."""
        return self.passes[-1]

    @property
    def number(self) -> int:
        """Its number, from 0 on."""
        return len(self.passes) - 1

    def train(self, plan: Pass, journal: Journal) -> bool:
        """Train a pass to its end; False when the time is up."""
        if not self.passes or plan is not self.current:
            self.passes.append(plan)
            if self.number:  # a run without any block has no flow.json yet
                self._commit()
            elif "init_from" in self.about and self.accelerator.is_main_process:
                atomic.write_json(self.folder / INITIAL, self.about["init_from"])
        journal.number = self.number
        stage = self.source.first_stage(self.folder, self.config, self.accelerator)
        for row in self.current.blocks:
            block = load_block(self.folder, row, self.source.shape)[1]
            stage = self._push(stage, block, row["sha256"], row["stage"])
        while not self.current.complete:
            following = self._block(stage, journal)
            if following is None:
                return False
            stage = following
        return True

    def _push(self, stage: StoreReader, block: Block, sha256: str, name: str) -> StoreReader:
        """The stage after a block; one that was lost is made again."""
        block.to(self.accelerator.device)
        return next_stage(
            self.folder,
            self.config,
            stage,
            block,
            sha256,
            self.accelerator,
            self.progress,
            self.folder / name,
        )

    def _initial(self, index: int) -> tuple[BlockSpec, Block]:
        """The next block as it starts: from another, or anew.

        The other is its parent in the pass before, else its counterpart in the run that this one
        starts from, else the block before it.
        """
        plan, shape = self.current, self.source.shape
        h = plan.step(index)  # γ under lfm, which has no later passes
        if plan.own:
            assert plan.base is not None
            parent, part, parts = plan.parent(index)
            row = self.passes[plan.base].blocks[parent]
            spec, block = split_block(*load_block(self.folder, row, shape), parts)[part]
            return dataclasses.replace(spec, h=h), block
        velocity = self.config.velocity
        if self.config.jko is not None:
            solver = self.config.jko.solver.of_block(index)
            solver = dataclasses.replace(solver, steps=plan.substeps[index])
            velocity = dataclasses.replace(velocity, class_dropout=0.0)  # it drops no class
            spec = BlockSpec(velocity=velocity, solver=solver, h=h)
        else:  # its training integrates nothing
            solver = self.config.sampler.of_block(index)
            spec = BlockSpec(velocity=velocity, solver=solver, objective="lfm", gamma=h)
        salt = [self.number] if self.number else []
        drawn = generator(self.config.train.seed, "weights", index, *salt)
        folder, other = self._other(index, free=h is None)
        if other is not None:
            before, block = load_block(folder, other, shape)
            alike = dataclasses.replace(
                before.velocity, classes=velocity.classes, width=velocity.width
            )
            if becomes_several(before.velocity, velocity):
                alike = dataclasses.replace(alike, nets=velocity.nets)
            if alike == velocity and widening_factor(before.velocity, velocity):
                spec = dataclasses.replace(spec, start=before.start, length=before.length)
                block = transform_block(block, before, spec, drawn)
                block.solver = solver
                return spec, block
        return spec, build_block(spec, shape, drawn)

    def _other(self, index: int, free: bool) -> tuple[Path, Row | None]:
        """The run and the row of the block that the next one starts from; no row for none."""
        train = self.config.train
        if train.init_from is not None:
            row = initial_row(self.about["init_from"], index, free)
            if row is not None:
                return locate(train.init_from), row
        warm = train.warm_start and index > 0
        return self.folder, self.current.blocks[index - 1] if warm else None

    def _block(self, stage: StoreReader, journal: Journal) -> StoreReader | None:
        """Train and commit one block; None when the time is up."""
        index = len(self.current.blocks)
        spec, block = self._initial(index)
        iterations, recipe = self.current.iterations[index], self.config.train
        recipe = dataclasses.replace(recipe, iterations=iterations, lr=self.current.lr[index])
        options = self.config.jko or self.config.matching
        trainer = BlockTrainer(
            block, spec, stage, recipe, options, self.accelerator, number=self.number
        )
        if not self._optimise(trainer, journal):
            return None
        file = self._commit_block(trainer)
        solver = self.config.sampler.of_block(index)
        measured, following = measure(trainer, stage, solver, self.progress), stage
        found: Row = measured.moved
        if self.current.step(index) is not None:  # no block trains on what a free one leaves
            name = stage_file(index + 1, self.number)
            following = self._push(stage, trainer.block, file["sha256"], name)
            found = following.manifest
        with errors_on_all_ranks(self.accelerator):
            if self.accelerator.is_main_process:
                total = measured.terms["total"]
                check_grid(trainer, stage, solver, total, journal, self.progress)
        self._record(trainer, file, {**found, "terms": measured.terms}, journal)
        return following

    def _commit_block(self, trainer: BlockTrainer) -> Row:
        """Write the trained block; returns file and sha256."""
        block, name = trainer.finish(), block_file(trainer.index, self.number)
        if self.accelerator.is_main_process:
            atomic.write_tensors(self.folder / name, block.state_dict())
        self.accelerator.wait_for_everyone()
        return {"file": name, "sha256": atomic.sha256_file(self.folder / name)}

    def _optimise(self, trainer: BlockTrainer, journal: Journal) -> bool:
        """Run the optimiser to its end, with checkpoints; False when the time is up."""
        recipe, index = trainer.recipe, trainer.index
        path = self._checkpoint_file(index)
        if path.is_file():
            trainer.load(path)
        journal.rewind(index, trainer.done)
        saved = time.monotonic()
        before = sum(self.current.iterations[:index])
        every = self.config.fm.snapshot_every if self.config.fm is not None else 0
        todo = range(trainer.done, trainer.iterations)
        size, symbol = trainer.spec.step, "γ" if trainer.spec.h is None else "h"
        kind = "free" if size is None else f"{symbol}={size:.3g}"
        place = f"pass {self.number} block {index}" if self.number else f"block {index}"
        for _ in self.progress(todo, len(todo), f"{place} ({kind})"):
            step = trainer.step()
            journal.add(step.terms)
            if trainer.done % recipe.log_every == 0 or trainer.done == trainer.iterations:
                seconds = round(trainer.seconds, 3)
                journal.flush(index, trainer.done, before + trainer.done, seconds=seconds)
            if every and trainer.done % every == 0:
                keep(self.folder, trainer, self.number)
            out_of_time = recipe.max_minutes > 0 and broadcast_decision(
                self.accelerator, time.monotonic() > self.deadline
            )
            due = out_of_time or time.monotonic() - saved > recipe.checkpoint_seconds
            if broadcast_decision(self.accelerator, due):
                trainer.save(path)
                saved = time.monotonic()
            if out_of_time:
                return False
        trainer.save(path)
        return True

    def _checkpoint_file(self, index: int) -> Path:
        prefix = f"pass-{self.number:02d}-" if self.number else ""
        return self.folder / "checkpoints" / f"{prefix}block-{index:02d}.safetensors"

    def _record(self, trainer: BlockTrainer, file: Row, found: Row, journal: Journal) -> None:
        """Enter the finished block into flow.json; from here on it counts.

        Args:
            trainer: of the block.
            file: file and sha256.
            found: movement, squared_movement, squared_norm and terms; error of a distilled block.
            journal: the log.
        """
        index = trainer.index
        row = {
            **file,
            "h": trainer.spec.h,
            "gamma": trainer.spec.gamma,
            "objective": trainer.spec.objective,
            "iterations": trainer.done,
            "lr": trainer.lr,
            "movement": found["movement"],
            "ter": stopping_ratio(found["squared_movement"], found["squared_norm"]),
            "terms": found["terms"],
            "seconds": round(trainer.seconds, 3),
            "parameters": sum(p.numel() for p in trainer.parameters),
        }
        if "error" in found:
            row["error"] = found["error"]
        spec = trainer.spec.to_dict()
        whole = {**row, "stage": stage_file(index + 1, self.number), "spec": spec}
        self.passes[-1] = self.current.with_row(whole)
        self.trained += 1
        if self.current.complete:
            self._sum_up(trainer.block.velocity.dim, journal)
        self._commit()
        if self.accelerator.is_main_process:
            self._checkpoint_file(index).unlink(missing_ok=True)
            told = {"block": index, "step": trainer.done, "event": "finished"}
            journal.write({**told, **readable(row)})
        self.accelerator.wait_for_everyone()

    def _sum_up(self, dim: int, journal: Journal) -> None:
        """Log what a finished pass came to, and plot the movements of all passes."""
        summary = summarise(self.current.blocks, dim)
        self.passes[-1] = dataclasses.replace(self.current, summary=summary)
        if self.accelerator.is_main_process:
            row = {"block": len(self.current.blocks), "event": "pass finished"}
            journal.write({**row, "kind": self.current.kind, **summary})
            manifest = compose(self.about, self.source.shape, self.passes)
            plot_movement(manifest, self.folder / "samples" / "movement.png")

    def _commit(self) -> None:
        if self.accelerator.is_main_process:
            manifest = compose(self.about, self.source.shape, self.passes)
            atomic.write_json(self.folder / "flow.json", manifest)

    def tidy(self) -> None:
        """Remove what only a training needs: checkpoints, and stages of earlier passes."""
        if not self.passes or not self.accelerator.is_main_process:
            return
        for checkpoint in (self.folder / "checkpoints").glob("*.safetensors"):
            checkpoint.unlink()
        used = {row["stage"] for row in self.current.blocks} | {stage_file(0)}
        for stage in list((self.folder / "stages").glob("**/stage-*")):
            if stage.is_dir() and stage.relative_to(self.folder).as_posix() not in used:
                # first, so that a half-removed stage does not look whole
                (stage / "manifest.json").unlink(missing_ok=True)
                shutil.rmtree(stage)


def keep(folder: Path, trainer: BlockTrainer, number: int) -> None:
    """Commit the averaged weights of a block in training; all processes call it, the first writes.

    A training that was killed and resumed comes by here again, with the same weights.

    Args:
        folder: the run directory.
        trainer: of the block.
        number: the pass.
    """
    weights, place = trainer.weights(), _place(number)
    if not trainer.accelerator.is_main_process:
        return
    name = f"{place}/step-{trainer.done:08d}.safetensors"
    sha256 = atomic.write_tensors(folder / name, weights)
    row = {
        "file": name, "sha256": sha256, "step": trainer.done,
        "seen": trainer.done * trainer.recipe.batch_size, "seconds": round(trainer.seconds, 3),
    }  # fmt: skip
    before = [other for other in snapshots_of(folder, number) if other["step"] < trainer.done]
    atomic.write_json(folder / place / _LIST, [*before, row])
