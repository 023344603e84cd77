"""Trains the flow block by block: latent cache → run directory.

For every block: open its stage, train, commit the block, push the stage through it, commit
flow.json. Each of these steps is skipped when its result is there, so that a killed training,
run again with `--resume`, ends in the same bytes as one that was never stopped.

Reference: JKO-iFlow, Algorithm 1.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from flows.flow import Flow
from flows.schedule import step_sizes, stopping_ratio
from flows.spec import BlockSpec, build_block
from pipeline import commit
from pipeline.blocks import BlockTrainer
from pipeline.config import Config
from pipeline.config_files import to_dict
from pipeline.errors import UserError
from pipeline.journal import Journal
from pipeline.latents import Progress
from pipeline.runs import FORMAT, block_file, load_blocks, read_config, read_manifest, start_run
from pipeline.seeds import generator
from pipeline.stages import LatentSource, Source, next_stage
from pipeline.store import StoreReader

#: sections that decide the weights; a run is not continued under other values of them
DECISIVE = ("data", "autoencoder", "latents", "velocity", "solver", "push", "schedule", "train")
#: keys of them that do not
_INDIFFERENT = ("max_minutes", "checkpoint_seconds", "log_every", "test_split")


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended.

    Attributes:
        blocks: finished blocks.
        complete: whether the flow is finished (else it can be resumed).
        trained: blocks that this call finished.
    """

    blocks: int
    complete: bool
    trained: int


def train(
    config: Config,
    folder: Path,
    accelerator: Accelerator,
    progress: Progress,
    resume: bool,
    source: Source | None = None,
) -> Outcome:
    """Train a run to its end, or until `train.max_minutes`.

    Args:
        config: the configuration; a run that is continued must have been started with it.
        folder: the run directory.
        accelerator: device and processes.
        progress: wraps loops.
        resume: continue what is there; without it a run directory with a run is refused.
        source: where the samples come from; None is the latent cache.

    Returns:
        How it ended.

    Raises:
        UserError: bad configuration, or a run that is there without `resume`.
        JkoflowError: a block failed.
    """
    check(config)
    source = source or LatentSource(config)
    _enter(config, folder, accelerator, resume)
    return _Training(config, folder, source, accelerator, progress).run()


def check(config: Config) -> None:
    """Refuse sizes and schedules that cannot be trained, before anything is written.

    Raises:
        UserError: names the key, the value and what is expected.
    """
    at_least = {
        "train.iterations": config.train.iterations,
        "train.batch_size": config.train.batch_size,
        "train.log_every": config.train.log_every,
        "latents.draws": config.latents.draws,
        "train.probes": config.train.probes,
        "schedule.max_blocks": config.schedule.max_blocks,
        "latents.shard_size": config.latents.shard_size,
    }
    for name, value in at_least.items():
        if value < 1:
            raise UserError(f"{name} must be at least 1, not {value}")
    if config.train.lr <= 0:
        raise UserError(f"train.lr must be positive, not {config.train.lr}")
    if config.latents.noise < 0:
        raise UserError(f"latents.noise must not be negative, not {config.latents.noise}")
    if config.train.objective != "jko":
        raise UserError(f"unknown objective {config.train.objective!r}; choose jko")
    steps(config)


def steps(config: Config) -> list[float]:
    """The step sizes h_k of the blocks with a movement term."""
    schedule = config.schedule
    return step_sizes(schedule.h0, schedule.rho, schedule.h_max, schedule.max_blocks)


def _enter(config: Config, folder: Path, accelerator: Accelerator, resume: bool) -> None:
    """Start a run directory, or make sure that the one there may be continued."""
    there = (folder / "config.yaml").is_file()
    if there and not resume:
        raise UserError(
            f"there is a run at {folder} already; continue it with --resume, or choose another "
            "place with --run"
        )
    if there:
        old, new = to_dict(read_config(folder)), to_dict(config)
        changed = [
            f"{section}.{key}"
            for section in DECISIVE
            for key in new[section]
            if key not in _INDIFFERENT and old[section].get(key) != new[section][key]
        ]
        if changed:
            raise UserError(
                f"the run at {folder} was started with other values of {', '.join(changed)}; "
                "continue it with those, or train elsewhere with --run"
            )
    elif folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no run; choose another place with --run")
    accelerator.wait_for_everyone()
    if not there and accelerator.is_main_process:
        start_run(folder, config)
    accelerator.wait_for_everyone()


class _Training:
    """One call of `train`: the loop over blocks and what it carries along."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        source: Source,
        accelerator: Accelerator,
        progress: Progress,
    ) -> None:
        self.config, self.folder, self.source = config, folder, source
        self.accelerator, self.progress = accelerator, progress
        self.steps = steps(config)
        self.deadline = time.monotonic() + 60 * config.train.max_minutes
        if (folder / "flow.json").is_file():
            self.manifest = read_manifest(folder)
            self.flow = load_blocks(folder, self.manifest)
        else:
            self.flow = Flow(source.shape)
            self.manifest = {
                "format": FORMAT,
                "complete": False,
                "name": config.name,
                "flow": self.flow.to_config(),
                "blocks": [],
                **source.manifest(),
            }

    def run(self) -> Outcome:
        before = len(self.flow)
        if not self.manifest["complete"]:
            stage = self._stage()
            with Journal(self.folder, self.accelerator.is_main_process) as journal:
                while not self.manifest["complete"]:
                    following = self._block(stage, journal)
                    if following is None:
                        break
                    stage = following
        done = len(self.flow)
        return Outcome(done, self.manifest["complete"], done - before)

    def _stage(self) -> StoreReader:
        """The stage of the next block; stages that were lost are made again."""
        stage = self.source.first_stage(self.folder, self.config, self.accelerator)
        for index, row in enumerate(self.manifest["blocks"]):
            stage = self._push(stage, index, row["sha256"])
        return stage

    def _push(self, stage: StoreReader, index: int, sha256: str) -> StoreReader:
        block = self.flow[index].to(self.accelerator.device)
        return next_stage(
            self.folder, self.config, stage, block, sha256, self.accelerator, self.progress
        )

    def _spec(self) -> BlockSpec:
        """The next block: a step of the schedule, or the free block after the last."""
        index = len(self.flow)
        free = index >= len(self.steps) or self._stopped()
        h = None if free else self.steps[index]
        return BlockSpec(velocity=self.config.velocity, solver=self.config.solver, h=h)

    def _stopped(self) -> bool:
        rows = self.manifest["blocks"]
        return bool(rows) and rows[-1]["ter"] < self.config.schedule.tolerance

    def _complete(self) -> bool:
        """Whether the block that was just finished is the last."""
        rows, schedule = self.manifest["blocks"], self.config.schedule
        if rows[-1]["h"] is None:
            return True
        return not schedule.free_block and (len(rows) >= len(self.steps) or self._stopped())

    def _block(self, stage: StoreReader, journal: Journal) -> StoreReader | None:
        """Train and commit one block; None when the time is up."""
        index, spec = len(self.flow), self._spec()
        seed = self.config.train.seed
        block = build_block(spec, self.source.shape, generator(seed, "weights", index))
        if self.config.train.warm_start and index:
            block.load_state_dict(self.flow[index - 1].state_dict())
        trainer = BlockTrainer(block, spec, stage, self.config.train, self.accelerator)
        if not self._optimise(trainer, journal):
            return None
        block = trainer.finish()
        path = self.folder / block_file(index)
        if self.accelerator.is_main_process:
            commit.write_tensors(path, block.state_dict())
        self.accelerator.wait_for_everyone()
        sha256 = commit.sha256_file(path)
        self.flow.blocks.append(block)
        self.flow.specs.append(spec)
        following = self._push(stage, index, sha256)
        self._commit(trainer, following, sha256, journal)
        return following

    def _optimise(self, trainer: BlockTrainer, journal: Journal) -> bool:
        """Run the optimiser to its end, with checkpoints; False when the time is up."""
        recipe, index = self.config.train, trainer.index
        path = self.folder / "checkpoints" / f"block-{index:02d}.safetensors"
        if path.is_file():
            trainer.load(path)
        journal.rewind(index, trainer.done)
        saved = time.monotonic()
        todo = range(trainer.done, recipe.iterations)
        h = "free" if trainer.spec.h is None else f"h={trainer.spec.h:.3g}"
        for _ in self.progress(todo, len(todo), f"block {index} ({h})"):
            step = trainer.step()
            journal.add(step.terms)
            if trainer.done % recipe.log_every == 0 or trainer.done == recipe.iterations:
                total = index * recipe.iterations + trainer.done
                journal.flush(index, trainer.done, total, seconds=round(trainer.seconds, 3))
            out_of_time = recipe.max_minutes > 0 and time.monotonic() > self.deadline
            if out_of_time or time.monotonic() - saved > recipe.checkpoint_seconds:
                self._checkpoint(trainer, path)
                saved = time.monotonic()
            if out_of_time:
                return False
        self._checkpoint(trainer, path)
        return True

    def _checkpoint(self, trainer: BlockTrainer, path: Path) -> None:
        if self.accelerator.is_main_process:
            trainer.save(path)

    def _commit(
        self, trainer: BlockTrainer, stage: StoreReader, sha256: str, journal: Journal
    ) -> None:
        """Enter the finished block into flow.json; from here on it counts."""
        index, moved = trainer.index, stage.manifest
        ter = stopping_ratio(moved["squared_movement"], moved["squared_norm"])
        row = {
            "file": block_file(index),
            "sha256": sha256,
            "h": trainer.spec.h,
            "objective": trainer.spec.objective,
            "iterations": trainer.done,
            "movement": moved["movement"],
            "ter": ter,
            "seconds": round(trainer.seconds, 3),
            "parameters": sum(p.numel() for p in trainer.parameters),
        }
        self.manifest["blocks"].append(row)
        self.manifest["flow"] = self.flow.to_config()
        self.manifest["complete"] = self._complete()
        if self.accelerator.is_main_process:
            commit.write_json(self.folder / "flow.json", self.manifest)
            (self.folder / "checkpoints" / f"block-{index:02d}.safetensors").unlink(
                missing_ok=True
            )
            journal.write({"block": index, "step": trainer.done, "event": "finished", **row})
        self.accelerator.wait_for_everyone()
