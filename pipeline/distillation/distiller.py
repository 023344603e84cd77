"""Trains blocks that each stand for several of a teacher's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from flows.block import Block
from flows.errors import SolveError
from flows.networks.condition import Condition
from flows.solving.solver import SolverConfig
from flows.spec import BlockSpec, build_block
from pipeline.config.load import to_dict
from pipeline.config.schema import Config, of_block
from pipeline.errors import JkoflowError, UserError
from pipeline.runs.passes import Pass, Row, step_of
from pipeline.runs.run import Run
from pipeline.runtime.console import Progress
from pipeline.runtime.rng import Batches, generator
from pipeline.storage import atomic
from pipeline.storage.shards import MANIFEST, StoreReader, StoreWriter
from pipeline.storage.training_log import Journal
from pipeline.training.block_trainer import BlockTrainer
from pipeline.training.diagnostics import measure
from pipeline.training.pass_trainer import Trainer
from pipeline.training.planner import recipe_of
from pipeline.training.sources import Source
from pipeline.training.stages import carry, ensure_stage, stage_file

_MEASURED = 4096
_SOLVED = SolverConfig(method="dopri5")


class PairReader(StoreReader):
    """Two stages as one: samples in the field `z`, where the teacher carries them in `end`."""

    def __init__(self, before: StoreReader, after: StoreReader) -> None:
        super().__init__(before.folder, before.manifest)
        self.after = after

    def take(self, name: str, indices: Tensor) -> Tensor:
        """See :class:`StoreReader`."""
        if name == "end":
            return self.after.take("z", indices)
        return super().take(name, indices)


class Distiller(Trainer):
    """Trains merged blocks on the teacher's pairs; everything else is as in training.

    Args:
        teacher: the finished run.
        pairs: blocks merged into one.
        config: of the student.
        folder: its run directory.
        source: of the samples.
        accelerator: device and processes.
        progress: wraps loops.
        manifest: flow.json of the student so far; None if no block is finished.

    Raises:
        UserError: the student's blocks so far came from another teacher or other groups.
    """

    def __init__(
        self,
        teacher: Run,
        pairs: int,
        config: Config,
        folder: Path,
        source: Source,
        accelerator: Accelerator,
        progress: Progress,
        manifest: dict[str, Any] | None,
    ) -> None:
        super().__init__(config, folder, source, accelerator, progress, manifest)
        self.teacher = teacher
        self.rows: list[Row] = teacher.manifest["blocks"]
        count = len(self.rows)
        self.groups = [range(k, min(k + pairs, count)) for k in range(0, count, pairs)]
        about = _about(teacher, config.name, self.groups)
        if manifest is None:
            same = all(self._carried(index) for index in range(len(self.groups)))
        else:
            same = self.about.get("teacher", {}).get("key") == about["teacher"]["key"]
        if not same:
            raise UserError(
                f"the run at {folder} is distilled from other blocks, or in other groups; "
                "continue it with those, or distill elsewhere with --out"
            )
        self.about = about

    def plan(self) -> Pass:
        """The one pass: a merged block takes the steps of its blocks together."""
        if self.passes:
            return self.current
        steps = [[step_of(self.rows[k]) for k in group] for group in self.groups]
        sums = [sum(s for s in each if s is not None) for each in steps if None not in each]
        train, count = self.config.train, len(self.groups)
        jko = any(row["h"] is not None for row in self.rows)
        return Pass(
            "distill",
            [float(s) for s in sums] if jko else [],
            None in steps[-1],
            None,
            [of_block(train.iterations, index) for index in range(count)],
            [self.config.sampler.of_block(index).steps for index in range(count)],
            recipe=recipe_of(self.config),
            objective="distill",
            gamma=[] if jko else [float(s) for s in sums],
            lr=[of_block(train.lr, index) for index in range(count)],
        )

    def train(self, plan: Pass, journal: Journal) -> bool:
        """Train all merged blocks that are not finished; False when the time is up."""
        if not self.passes:
            self.passes.append(plan)
        journal.number = self.number
        before = self.source.first_stage(self.folder, self.config, self.accelerator)
        for index in range(len(self.groups)):
            after = self._carry(before, index)
            if index >= len(self.current.blocks):
                if not self._merge(PairReader(before, after), journal):
                    return False
            before = after
        return True

    def _carried(self, index: int) -> bool:
        """Whether what lies in the place of a group's stage, if anything, is of that group.

        A run that was stopped in its first block has nothing else to tell its groups by.
        """
        path = self.folder / stage_file(index + 1) / MANIFEST
        if not path.is_file():
            return True
        identity = atomic.read_json(path, "manifest").get("identity", {})
        return bool(identity.get("teacher") == self._blocks(index))

    def _blocks(self, index: int) -> list[str]:
        """The teacher's blocks of a group."""
        return [self.rows[k]["sha256"] for k in self.groups[index]]

    def _carry(self, before: StoreReader, index: int) -> StoreReader:
        """The stage after a group of the teacher's blocks, by the solver that pushes there."""
        group, sampler = self.groups[index], self.teacher.config.sampler
        identity = {
            "kind": "stage",
            "stage": index + 1,
            "before": before.manifest["key"],
            "teacher": self._blocks(index),
            "solvers": [dataclasses.asdict(sampler.of_block(k)) for k in group],
            "shape": list(self.source.shape),
        }
        flow = self.teacher.flow.to(self.accelerator.device)
        labels = partial(before.read, "labels") if flow.classes else None
        blocks = {k: (flow[k], sampler.of_block(k)) for k in group}

        def make(writer: StoreWriter, shard: int) -> Tensor:
            bounds, label = writer.bounds(shard), f"teacher {index + 1}.{shard}"
            try:
                return carry(before, bounds, blocks, self.accelerator, self.progress, label)
            except SolveError as error:
                raise JkoflowError(f"the teacher fails: {error}") from error

        size, there = self.config.latents.shard_size, self.folder / stage_file(index + 1)
        place = (self.accelerator, before, there, labels)
        return ensure_stage(self.folder, identity, len(before), size, make, *place)

    def _merge(self, pairs: PairReader, journal: Journal) -> bool:
        """Train and commit one merged block; False when the time is up."""
        spec, block = self._initial(len(self.current.blocks))
        train, options = self.config.train, self.config.matching
        trainer = BlockTrainer(block, spec, pairs, train, options, self.accelerator)
        if not self._optimise(trainer, journal):
            return False
        file = self._commit_block(trainer)
        solver = self.config.sampler.of_block(trainer.index)
        found = errors(trainer.block, pairs, solver, self.config.train.seed)
        terms = measure(trainer, pairs, _SOLVED, self.progress).terms
        self._record(trainer, file, {**found, "terms": terms}, journal)
        return True

    def _initial(self, index: int) -> tuple[BlockSpec, Block]:
        """A merged block as it starts: from the first block of its group, or anew."""
        config, shape = self.config, tuple(self.source.shape)
        step, jko = self.current.step(index), bool(self.current.h)
        spec = BlockSpec(
            velocity=config.velocity, solver=config.sampler.of_block(index), objective="distill",
            h=step if jko else None, gamma=None if jko else step,
        )  # fmt: skip
        block = build_block(spec, shape, generator(config.train.seed, "weights", index))
        first = self.groups[index][0]
        theirs = self.teacher.flow.specs[first]
        if config.train.warm_start and theirs.velocity == spec.velocity and not theirs.sliced:
            block.load_state_dict(self.teacher.flow[first].state_dict())
        return spec, block


@torch.no_grad()
def errors(block: Block, pairs: StoreReader, solver: SolverConfig, seed: int) -> dict[str, Any]:
    """How far a merged block ends from the teacher, there and back, on a fixed set of samples.

    Args:
        block: finished.
        pairs: samples `z` and where the teacher carries them, `end`; their `labels`, for a block
            with classes.
        solver: that samples.
        seed: of the choice of samples.

    Returns:
        error (forward and reverse: mean squared distance per dimension), and of the block's own
        map movement, squared_movement, squared_norm.

    Raises:
        JkoflowError: the block cannot be followed.
    """
    rows = Batches(len(pairs), min(len(pairs), _MEASURED), seed, "measure").indices(0)
    device = next(block.parameters()).device
    z, end = pairs.take("z", rows).to(device), pairs.take("end", rows).to(device)
    of = Condition(pairs.take("labels", rows)) if block.velocity.classes else None
    try:
        there = block.transport(z, solver=solver, condition=of).z
        back = block.transport(end, reverse=True, solver=solver, condition=of).z
    except SolveError as error:
        raise JkoflowError(f"a merged block cannot be followed: {error}") from error
    moved, norm = (float(x.double().square().sum()) / len(z) for x in (there - z, there))
    away = {"forward": there - end, "reverse": back - z}
    return {
        "error": {name: float(x.double().square().mean()) for name, x in away.items()},
        "movement": math.sqrt(moved),
        "squared_movement": moved,
        "squared_norm": norm,
    }


def _about(teacher: Run, name: str, groups: Sequence[range]) -> dict[str, Any]:
    """Entries of the student's flow.json: those of the teacher's that describe the data."""
    kept = ("standardisation", "latents", "autoencoder", "data", "classes", "class_names")
    about = {key: teacher.manifest[key] for key in kept if key in teacher.manifest}
    rows = teacher.manifest["blocks"]
    if about.get("autoencoder", {}).get("weights"):
        weights = teacher.autoencoder_weights()  # of an exported run they may lie inside it
        if weights != about["autoencoder"]["weights"]:
            weights = str(Path(str(weights)).resolve())
        about["autoencoder"] = {**about["autoencoder"], "weights": weights}
    blocks = [row["sha256"] for row in rows]
    return {
        "name": name,
        **about,
        "teacher": {
            "run": str(teacher.folder.resolve()),
            "name": teacher.config.name,
            "objective": teacher.config.train.objective,
            "fingerprint": "-".join(sha[:12] for sha in blocks),
            "blocks": blocks,
            "sampler": to_dict(teacher.config.sampler),
            "groups": [list(group) for group in groups],
            "key": [[rows[k]["sha256"] for k in group] for group in groups],
        },
    }
