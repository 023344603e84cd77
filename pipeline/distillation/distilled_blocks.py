"""Blocks that each stand for several consecutive blocks of a teacher."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from flows.block import Block, SolverConfig
from flows.errors import SolveError
from flows.networks.base import Velocity
from flows.networks.condition import Condition
from flows.objectives.losses import LfmLoss, matching_loss
from flows.spec import BlockSpec, build_block
from pipeline.config.plain import to_dict
from pipeline.config.schema import Config
from pipeline.config.values import of_block
from pipeline.errors import JkoflowError
from pipeline.runs.manifest import DerivationRecord, Manifest
from pipeline.runs.passes import Pass
from pipeline.runs.run import Run
from pipeline.runtime.rng import Batches, generator
from pipeline.storage.shards.reader import StoreReader
from pipeline.storage.shards.writer import StoreWriter
from pipeline.storage.training_log import TrainingLog
from pipeline.training.batches.matching_loss import Regression, stratified_times
from pipeline.training.block_source import TrainingContext
from pipeline.training.block_trainer import BlockTrainer
from pipeline.training.diagnostics import Diagnostics, measure
from pipeline.training.planner import recipe_of
from pipeline.training.stages import (
    carry,
    ensure_stage,
    samples_left,
    stage_file,
    stage_index,
)

_MEASURED = 4096
_SOLVED = SolverConfig(method="dopri5")


class PairReader(StoreReader):
    """Two stages as one: samples in the field `z`, and where the teacher carries them in `end`."""

    def __init__(self, before: StoreReader, after: StoreReader) -> None:
        super().__init__(before.folder, before.manifest)
        self.before, self.after = before, after

    def take(self, name: str, indices: Tensor) -> Tensor:
        """Return a field (n, *shape) at indices (n,); `end` has the samples after the group."""
        if name == "end":
            return self.after.take("z", indices)
        return self.before.take(name, indices)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return the samples [start, stop) of a field before the group, (n, …)."""
        return self.before.read(name, start, stop)


class DistilledBlocks:
    """Source of merged blocks: each is regressed on the map of a group of the teacher's blocks.

    See `pipeline.training.block_source.BlockSource` for the methods.
    """

    def __init__(self, context: TrainingContext, teacher: Run, groups: Sequence[range]) -> None:
        self.context, self.teacher, self.groups = context, teacher, groups
        self.regression: Regression | None = pair_loss
        self._stage: StoreReader | None = None

    def initial(self, passes: Sequence[Pass], index: int) -> tuple[BlockSpec, Block]:
        """Build a merged block; it starts from the first block of its group, if that fits."""
        config, shape, plan = self.context.config, self.context.samples.shape, passes[-1]
        step, jko = plan.step(index), bool(plan.h)
        first = self.groups[index][0]
        parent = self.teacher.flow.specs[first]
        fits = parent.velocity == config.velocity and not parent.sliced
        warm = config.train.warm_start and fits
        spec = BlockSpec(
            velocity=config.velocity, solver=config.sampler.of_block(index), objective="distill",
            h=step if jko else None, gamma=None if jko else step,
            skip=parent.skip if warm else 0.0,
        )  # fmt: skip
        block = build_block(spec, shape, generator(config.train.seed, "weights", index))
        if warm:
            block.load_state_dict(self.teacher.flow[first].state_dict())
        return spec, block

    def samples(self, passes: Sequence[Pass], index: int) -> PairReader:
        """Open the samples before a group, paired with those after it."""
        stage = self.context.first_stage() if self._stage is None else self._stage
        for earlier in range(stage_index(stage), index):
            stage = self._carry(stage, earlier)
        self._stage = self._carry(stage, index)
        return PairReader(stage, self._stage)

    def finish(
        self, passes: Sequence[Pass], trainer: BlockTrainer, sha256: str, log: TrainingLog
    ) -> Diagnostics:
        """Measure the map of a merged block, and its error in both directions."""
        config = self.context.config
        solver = config.sampler.of_block(trainer.index)
        moved, error = measure_map(trainer.block, trainer.stage, solver, config.train.seed)
        measured = measure(trainer, _SOLVED, self.context.progress)
        return Diagnostics(measured.terms, moved, error)

    def _carry(self, before: StoreReader, index: int) -> StoreReader:
        """Return the stage after a group of the teacher's blocks, by the teacher's sampler."""
        context, sampler = self.context, self.teacher.config.sampler
        rows = self.teacher.manifest.blocks
        identity = {
            "kind": "stage",
            "stage": index + 1,
            "before": before.manifest["key"],
            "teacher": [rows[k].sha256 for k in self.groups[index]],
            "solvers": [dataclasses.asdict(sampler.of_block(k)) for k in self.groups[index]],
            "shape": list(context.samples.shape),
        }
        flow = self.teacher.flow.to(context.accelerator.device)
        labels = partial(before.read, "labels") if flow.classes else None
        blocks = {k: (flow[k], sampler.of_block(k)) for k in self.groups[index]}

        def make(writer: StoreWriter, shard: int) -> Tensor:
            label = f"push through the teacher's group {index}, part {shard}"
            left = samples_left(writer, shard, context.accelerator.num_processes)
            place = context.accelerator, context.progress
            try:
                return carry(before, writer.bounds(shard), blocks, *place, label, left)
            except SolveError as error:
                raise JkoflowError(
                    f"the teacher at {self.teacher.name} cannot be integrated ({error}); "
                    "distill another run"
                ) from error

        return ensure_stage(
            context.folder,
            identity,
            len(before),
            context.config.latents.shard_size,
            make,
            context.accelerator,
            before,
            context.folder / stage_file(index + 1),
            labels,
        )


def pair_loss(
    velocity: Velocity,
    stage: StoreReader,
    batch: Tensor,
    source: torch.Generator,
    rows: Tensor,
) -> LfmLoss:
    """Compute the regression on straight paths from samples z to their images T(z), (B, *shape).

        E ‖v(t, (1 − t) z + t T(z)) − (T(z) − z)‖²

    If the paths do not cross, the minimum is a velocity with straight trajectories whose map is T.
    One step of any solver follows it, in either direction. See
    `pipeline.training.batches.matching_loss.Regression` for the arguments; `stage` has z in the
    field `z` and T(z) in `end`.

    Reference: Xu, Cheng, Xie, "Local flow matching generative models" (2024), distillation; Liu,
    Gong, Liu, "Flow straight and fast" (2023).
    """
    device = next(velocity.parameters()).device
    t, chosen = stratified_times(len(batch), source)[rows].to(device), batch[rows]
    z, end = (stage.take(name, chosen).to(device) for name in ("z", "end"))
    labels = stage.take("labels", chosen).to(device) if velocity.classes else None
    return matching_loss(velocity, z, end, t, labels=labels)


@torch.no_grad()
def measure_map(
    block: Block, pairs: StoreReader, solver: SolverConfig, seed: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Measure the map of a finished block on a fixed set of samples `z` with images `end`.

    The results are movement, squared_movement and squared_norm of the map; and its error, forward
    and reverse: mean squared distance per dimension to the teacher's.

    Raises:
        JkoflowError: the block cannot be integrated.
    """
    rows = Batches(len(pairs), min(len(pairs), _MEASURED), seed, "measure").indices(0)
    device = next(block.parameters()).device
    z, end = pairs.take("z", rows).to(device), pairs.take("end", rows).to(device)
    condition = Condition(pairs.take("labels", rows)) if block.velocity.classes else None
    try:
        forward = block.transport(z, solver=solver, condition=condition).z
        reverse = block.transport(end, reverse=True, solver=solver, condition=condition).z
    except SolveError as error:
        raise JkoflowError(
            f"a merged block cannot be integrated ({error}); distill elsewhere with more --steps"
        ) from error
    moved, norm = (
        float(x.cpu().double().square().sum()) / len(z) for x in (forward - z, forward)
    )
    differences = {"forward": forward - end, "reverse": reverse - z}
    movement = {"movement": math.sqrt(moved), "squared_movement": moved, "squared_norm": norm}
    errors = {key: x.cpu().double().square().mean() for key, x in differences.items()}
    return movement, {key: float(error) for key, error in errors.items()}


def distillation_plan(config: Config, teacher: Run, groups: Sequence[range]) -> Pass:
    """Plan the one pass of a student: the step of a merged block is the sum over its group."""
    rows, train, count = teacher.manifest.blocks, config.train, len(groups)
    steps = [[rows[k].step for k in group] for group in groups]
    sums = [float(sum(s for s in group if s is not None)) for group in steps if None not in group]
    jko = any(row.h is not None for row in rows)
    return Pass(
        "distill",
        sums if jko else [],
        None in steps[-1],
        None,
        [of_block(train.iterations, index) for index in range(count)],
        [config.sampler.of_block(index).steps for index in range(count)],
        [of_block(train.lr, index) for index in range(count)],
        recipe=recipe_of(config),
        objective="distill",
        gamma=[] if jko else sums,
    )


def student_manifest(teacher: Run, name: str, groups: Sequence[range]) -> Manifest:
    """Return the student's manifest without passes; its samples are the teacher's."""
    known, autoencoder = teacher.manifest, teacher.manifest.autoencoder
    if autoencoder is not None and autoencoder.weights:
        weights = teacher.autoencoder_weights()  # an exported run may hold them
        if weights != autoencoder.weights:
            weights = str(Path(str(weights)).resolve())
        autoencoder = dataclasses.replace(autoencoder, weights=weights)
    derivation = DerivationRecord(
        "distilled",
        str(teacher.folder.resolve()),
        teacher.config.name,
        teacher.config.train.objective,
        blocks=[row.sha256 for row in known.blocks],
        groups=[list(group) for group in groups],
        sampler=to_dict(teacher.config.sampler),
    )
    return Manifest(
        name,
        known.shape,
        known.standardisation,
        known.data,
        known.latents,
        autoencoder,
        known.classes,
        known.class_names,
        derived_from=derivation,
    )


def same_groups(one: DerivationRecord | None, other: DerivationRecord | None) -> bool:
    """Return whether two students merge the same blocks in the same groups."""
    if one is None or other is None:
        return False
    groups = [
        [[record.blocks[k] for k in group] for group in record.groups] for record in (one, other)
    ]
    return groups[0] == groups[1]
