"""Stage caches: the training latents pushed through the blocks that are finished.

Stage 0 holds draws of the latents (posterior samples, or the latents with their known noise),
`latents.draws` of each; stage k + 1 is stage k pushed through block k. A block therefore trains
on a cached array, and its cost does not grow with the number of blocks before it.

Reference: JKO-iFlow, Algorithm 1.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from flows.block import Block
from pipeline.config import Config
from pipeline.latents import LatentCache, Progress
from pipeline.seeds import generator
from pipeline.store import StoreReader, StoreWriter, open_store

CHUNK = 2000


def stage_folder(run: Path, stage: int) -> Path:
    """Where a stage lies in a run directory."""
    return run / "stages" / f"stage-{stage:02d}"


def first_stage(
    run: Path, config: Config, cache: LatentCache, accelerator: Accelerator
) -> StoreReader:
    """Stage 0, made from the latent cache where it is not there yet."""
    latents = config.latents
    identity: dict[str, Any] = {
        "kind": "stage",
        "stage": 0,
        "latents": cache.key,
        "draws": latents.draws,
        "noise": latents.noise,
        "seed": latents.seed,
        "shape": list(cache.shape),
    }

    def make(writer: StoreWriter, index: int) -> torch.Tensor:
        first, last = writer.bounds(index)
        drawn = generator(latents.seed, "draw", index)
        parts = []
        while first < last:
            row = first % len(cache)
            stop = min(row + last - first, len(cache))
            parts.append(cache.draw(row, stop, latents.noise, drawn))
            first += stop - row
        return torch.cat(parts)

    count = len(cache) * latents.draws
    return _ensure(run, 0, identity, count, latents.shard_size, make, accelerator, None)


def next_stage(
    run: Path,
    config: Config,
    before: StoreReader,
    block: Block,
    sha256: str,
    accelerator: Accelerator,
    progress: Progress,
) -> StoreReader:
    """Push a stage through a finished block; its manifest records how far the samples moved.

    Args:
        run: the run directory.
        config: its configuration; `push` integrates.
        before: the stage that the block was trained on.
        block: the finished block, frozen.
        sha256: of the block's file, part of the identity.
        accelerator: device and processes.
        progress: wraps the loop over chunks.
    """
    stage = before.manifest["identity"]["stage"] + 1
    identity = {
        "kind": "stage",
        "stage": stage,
        "before": before.manifest["key"],
        "block": sha256,
        "push": dataclasses.asdict(config.push),
        "shape": before.manifest["identity"]["shape"],
    }

    @torch.inference_mode()
    def make(writer: StoreWriter, index: int) -> torch.Tensor:
        first, last = writer.bounds(index)
        z = before.read("z", first, last)
        starts = range(0, len(z), CHUNK)
        parts = []
        for start in progress(starts, len(starts), f"push {stage}.{index}"):
            chunk = z[start : start + CHUNK].to(accelerator.device)
            parts.append(block.transport(chunk, solver=config.push).z.cpu())
        return torch.cat(parts)

    size = config.latents.shard_size
    return _ensure(run, stage, identity, len(before), size, make, accelerator, before)


def _ensure(
    run: Path,
    stage: int,
    identity: dict[str, Any],
    count: int,
    shard_size: int,
    make: Any,  # noqa: ANN401 - (writer, index) -> samples
    accelerator: Accelerator,
    before: StoreReader | None,
) -> StoreReader:
    folder = stage_folder(run, stage)
    if (folder / "manifest.json").is_file():
        return open_store(folder, f"stage {stage}", identity)
    writer = StoreWriter(folder, identity, count, shard_size)
    for index in writer.missing(accelerator.process_index, accelerator.num_processes):
        writer.write(index, {"z": make(writer, index)})
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        writer.finish(lambda reader: _movement(before, reader))
    accelerator.wait_for_everyone()
    return open_store(folder, f"stage {stage}", identity)


def _movement(before: StoreReader | None, after: StoreReader) -> dict[str, float]:
    """E‖z' − z‖² and E‖z'‖² over all samples, in float64, in shard order."""
    moved, norm = 0.0, 0.0
    for index in range(len(after.manifest["shards"])):
        z = after.shard(index)["z"].double().flatten(1)
        norm += float((z**2).sum())
        if before is not None:
            moved += float(((z - before.shard(index)["z"].double().flatten(1)) ** 2).sum())
    result = {"squared_norm": norm / len(after)}
    if before is not None:
        result["squared_movement"] = moved / len(after)
        result["movement"] = math.sqrt(moved / len(after))
    return result
