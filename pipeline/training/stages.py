"""Stages: caches of the training samples, pushed through the finished blocks.

Stage 0 holds `latents.draws` draws of each latent (posterior samples, or the latents plus noise).
Stage k + 1 is stage k pushed through block k, or as many of its samples as a later block draws.
In a run with classes, every sample keeps its label, and the push is conditioned on it. A block
therefore trains on a cached array, and its cost does not grow with the number of blocks before it.

Reference: JKO-iFlow, Algorithm 1.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from flows.block import Block
from flows.errors import SolveError
from flows.networks.condition import Condition
from flows.solving.solver import SolverConfig
from pipeline.config.schema import Config
from pipeline.errors import JkoflowError, UserError
from pipeline.runtime.console import Progress, estimate_whole
from pipeline.runtime.devices import to_device
from pipeline.runtime.distributed import errors_on_all_ranks
from pipeline.runtime.rng import generator, order
from pipeline.runtime.system import require_disk_space
from pipeline.storage import atomic, seal
from pipeline.storage.shards.manifest import MANIFEST, Shard, require_identity
from pipeline.storage.shards.opening import open_store
from pipeline.storage.shards.reader import StoreReader
from pipeline.storage.shards.writer import StoreWriter

CHUNK = 2000
#: samples that a stage has at least, if the stage before has them
_LEAST = 10_000
_FLOAT = 4


def stage_file(stage: int, number: int = 0) -> str:
    """Return the folder of a stage inside a run directory; all passes share stage 0."""
    name = f"stage-{stage:02d}"
    return f"stages/pass-{number:02d}/{name}" if number and stage else f"stages/{name}"


def stage_index(stage: StoreReader) -> int:
    """Return the number of a stage: how many blocks its samples have passed."""
    return int(stage.manifest["identity"]["stage"])


def has_stage(run: Path, stage: int) -> bool:
    """Return whether a run holds a complete stage of its first pass."""
    return (stage_folder(run, stage) / MANIFEST).is_file()


def stage_folder(run: Path, stage: int, number: int = 0) -> Path:
    """Return the folder of a stage of a pass."""
    return Path(run) / stage_file(stage, number)


def next_stage(
    run: Path,
    config: Config,
    before: StoreReader,
    block: Block,
    sha256: str,
    accelerator: Accelerator,
    progress: Progress,
    folder: Path | None = None,
    draws: int | None = None,
    seed: int | None = None,
) -> StoreReader:
    """Push a stage through a finished block; the new manifest records the movement.

    If later blocks draw fewer samples than the stage has, as many are chosen at random.

    Args:
        run: the run directory.
        config: its configuration; `sampler` is the solver.
        before: the stage that the block was trained on.
        block: the finished block, frozen.
        sha256: of the block's file; it is part of the identity.
        accelerator: device and ranks.
        progress: wraps the loop over chunks.
        folder: of the new stage; None is that of the first pass.
        draws: samples that a later block draws at most; None pushes all. A finished stage is kept
            as it is.
        seed: of their choice; None is train.seed.

    Raises:
        JkoflowError: the block cannot be integrated.
    """
    stage = stage_index(before) + 1
    folder = folder or stage_folder(run, stage)
    solver = config.sampler.of_block(stage - 1)
    identity = {
        "kind": "stage",
        "stage": stage,
        "before": before.manifest["key"],
        "block": sha256,
        "solver": dataclasses.asdict(solver),
        "shape": before.manifest["identity"]["shape"],
    }

    seed = config.train.seed if seed is None else seed
    picks = _picks(before, folder, seed, stage, draws)
    if picks is not None:
        identity["samples"] = len(picks)
    labels = partial(_read, before, "labels", picks) if block.velocity.classes else None

    def make(writer: StoreWriter, index: int) -> torch.Tensor:
        label = f"push through block {stage - 1}, part {index}"
        left = samples_left(writer, index, accelerator.num_processes)
        try:
            blocks = {stage - 1: (block, solver)}
            return carry(
                before, writer.bounds(index), blocks, accelerator, progress, label, left, picks
            )
        except SolveError as error:
            raise JkoflowError(
                f"{error}; the samples cannot be pushed through this block; train elsewhere with "
                "a lower train.lr or more sampler.steps"
            ) from error

    size = config.latents.shard_size
    count = len(before) if picks is None else len(picks)
    return ensure_stage(
        run, identity, count, size, make, accelerator, before, folder, labels, picks
    )


def _picks(
    before: StoreReader, folder: Path, seed: int, stage: int, draws: int | None
) -> torch.Tensor | None:
    """Return the sorted indices of the samples to push; None for all."""
    count = len(before) if draws is None else min(len(before), max(draws, _LEAST))
    if (folder / MANIFEST).is_file():
        manifest = atomic.read_json(folder / MANIFEST, f"manifest of stage {stage}")
        count = manifest.get("identity", {}).get("samples", len(before))
    if not isinstance(count, int) or not 0 < count < len(before):
        return None
    chosen = order(len(before), generator(seed, "stage", stage))(torch.arange(count))
    return chosen.sort().values


def _read(
    before: StoreReader, name: str, picks: torch.Tensor | None, start: int, stop: int
) -> torch.Tensor:
    """Return a field of the samples that become [start, stop) of the next stage."""
    if picks is None:
        return before.read(name, start, stop)
    return before.take(name, picks[start:stop])


@torch.inference_mode()
def carry(
    before: StoreReader,
    bounds: tuple[int, int],
    blocks: Mapping[int, tuple[Block, SolverConfig]],
    accelerator: Accelerator,
    progress: Progress,
    label: str,
    left: int,
    picks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Transport some samples of a stage through blocks, chunk by chunk.

    Args:
        before: the stage.
        bounds: first sample, and the one after the last.
        blocks: with their solvers, by their index in the flow, in order.
        accelerator: the device.
        progress: wraps the loop over chunks.
        label: of that loop.
        left: samples of this part and the later ones, for the estimate of the time.
        picks: indices (n,) that the bounds refer to; None for all samples of the stage.

    Returns:
        the transported samples (last − first, *shape), on the CPU.

    Raises:
        SolveError: a block cannot be integrated; the error names its index.
    """
    parts, starts = [], range(*bounds, CHUNK)
    classes = any(block.velocity.classes for block, _ in blocks.values())
    bar = progress(starts, len(starts), label)
    estimate_whole(bar, label.rpartition(",")[0] or label, math.ceil(left / CHUNK), "chunk")
    for start in bar:
        stop = min(start + CHUNK, bounds[1])
        z = to_device(_read(before, "z", picks, start, stop), accelerator.device)
        condition = Condition(_read(before, "labels", picks, start, stop)) if classes else None
        for index, (block, solver) in blocks.items():
            try:
                z = block.transport(z, solver=solver, condition=condition).z
            except SolveError as error:
                raise error.in_block(index) from error
        parts.append(z.cpu())
    return torch.cat(parts)


def samples_left(writer: StoreWriter, index: int, ranks: int) -> int:
    """Return the number of samples in a shard and the later ones of the same rank."""
    spans = map(writer.bounds, range(index, writer.shards, ranks))
    return sum(last - first for first, last in spans)


def ensure_stage(
    run: Path,
    identity: dict[str, Any],
    count: int,
    shard_size: int,
    make: Callable[[StoreWriter, int], torch.Tensor | Shard],
    accelerator: Accelerator,
    before: StoreReader | None = None,
    folder: Path | None = None,
    labels: Callable[[int, int], torch.Tensor] | None = None,
    picks: torch.Tensor | None = None,
) -> StoreReader:
    """Open a stage, or write its missing shards first.

    Args:
        run: the run directory.
        identity: everything that decides the samples, with the number of the stage in `stage`.
        count: number of samples.
        shard_size: samples per shard.
        make: (writer, shard) → the samples of that shard, or its fields with the samples in `z`.
        accelerator: the ranks; rank r of R writes shards r, r + R, ….
        before: the stage it is pushed from; None for stage 0.
        folder: of the stage; None is that of the first pass.
        labels: (first, last) → the labels of these samples, int64; None for unlabelled samples.
        picks: indices (count,) of the samples in `before`; None for all.

    Raises:
        UserError: the samples of stage 0 hold NaN or infinity.
    """
    stage = identity["stage"]
    if labels is not None:
        identity = {**identity, "labels": True}
    folder = folder or stage_folder(run, stage)
    if (folder / MANIFEST).is_file():
        return open_store(folder, f"stage {stage}", identity)
    shape = identity.get("shape")
    if shape is not None:
        written = sum(path.stat().st_size for path in folder.glob("shard-*"))
        arrays = 3 if identity.get("moments") else 1  # z, its mean and its standard deviation
        size = arrays * _FLOAT * count * math.prod(shape) - written
        require_disk_space(folder, size, f"the samples of stage {stage}")
    writer = StoreWriter(folder, identity, count, shard_size)
    with errors_on_all_ranks(accelerator):
        for index in writer.missing(accelerator.process_index, accelerator.num_processes):
            shard = make(writer, index)
            fields = shard if isinstance(shard, dict) else {"z": shard}
            if before is None:
                _require_finite(fields["z"], writer.bounds(index)[0])
            classes = {} if labels is None else {"labels": labels(*writer.bounds(index))}
            writer.write(index, {**fields, **classes})
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        writer.finish(lambda reader: _movement(before, reader, picks))
    accelerator.wait_for_everyone()
    return open_store(folder, f"stage {stage}", identity)


def has_stored_stage(run: Path) -> bool:
    """Return whether a run has begun to store the samples of stage 0."""
    return any(stage_folder(run, 0).glob("shard-*"))


def ensure_drawn_stage(run: Path, drawn: StoreReader, accelerator: Accelerator) -> StoreReader:
    """Open a stage 0 whose samples are computed when they are read; its manifest is stored.

    Raises:
        UserError: the run was begun with other samples.
    """
    folder, what = stage_folder(run, 0), "stage 0"
    if accelerator.is_main_process and not (folder / MANIFEST).is_file():
        seal.start(folder)
        atomic.write_json(folder / MANIFEST, {**drawn.manifest, "shards": []})
    accelerator.wait_for_everyone()
    manifest = atomic.read_json(folder / MANIFEST, f"manifest of {what}")
    require_identity(manifest, drawn.manifest["identity"], folder, what)
    return drawn


def _require_finite(z: torch.Tensor, first: int) -> None:
    bad = ~z.flatten(1).isfinite().all(dim=1)
    if bool(bad.any()):
        raise UserError(
            f"{int(bad.sum())} of the training samples (stage 0) hold NaN or infinity, the first "
            f"of them sample {first + int(bad.nonzero()[0])}; remove them from the data"
        )


def _movement(
    before: StoreReader | None, after: StoreReader, picks: torch.Tensor | None
) -> dict[str, float]:
    """Compute E‖z' − z‖² and E‖z'‖² over the samples after, in float64, in shard order."""
    moved, norm = 0.0, 0.0
    for index in range(len(after.manifest["shards"])):
        z = after.shard(index)["z"].double().flatten(1)
        norm += float((z**2).sum())
        if before is not None:
            bounds = int(after.starts[index]), int(after.starts[index + 1])
            start = _read(before, "z", picks, *bounds)
            moved += float(((z - start.double().flatten(1)) ** 2).sum())
    result = {"squared_norm": norm / len(after)}
    if before is not None:
        result["squared_movement"] = moved / len(after)
        result["movement"] = math.sqrt(moved / len(after))
    return result
