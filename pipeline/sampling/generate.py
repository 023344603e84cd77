"""Run directory → images: noise through the blocks backwards, un-standardised, decoded.

Images lie in a store inside the run, addressed by everything that decides them (blocks,
autoencoder, solver, n, seed), so that they are made once, resume when interrupted, and are the
same on any number of processes. More images begin with those that are there already.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from autoencoders.base import Autoencoder, to_uint8
from flows.block import SolverConfig
from flows.networks.condition import Condition
from pipeline.config.schema import GenerateConfig
from pipeline.errors import UserError
from pipeline.runs.run import Run
from pipeline.runtime.console import Progress
from pipeline.runtime.distributed import errors_on_all_ranks
from pipeline.runtime.rng import generator
from pipeline.runtime.system import require_disk_space
from pipeline.sampling.sampling_plan import Way, way_of
from pipeline.sampling.solvers import described, solvers_of
from pipeline.storage.shards import (
    StoreReader,
    StoreWriter,
    content_key,
    find_similar_stores,
    open_store,
)

_KEEP_SMALLER_THAN = 500


def sample_images(
    run: Run, settings: GenerateConfig, accelerator: Accelerator, progress: Progress
) -> StoreReader:
    """Generate `settings.n` images, or open those generated before.

    Args:
        run: an open run.
        settings: n, seed, batch size, solver, classes, guidance, guide and refiner.
        accelerator: device and processes; rank r makes shards r, r + P, ….
        progress: wraps the loop over batches.

    Returns:
        A store with the field `images`, uint8 (n, C, H, W); its manifest has `nfe`.

    Raises:
        UserError: n or batch size below 1, more images than the disk holds, classes that the
            run does not know, or a guide or a refiner that does not fit.
        SolveError: the flow cannot be followed.
    """
    if settings.n < 1 or settings.batch_size < 1:
        raise UserError(
            f"n and generate.batch_size must be at least 1, not {settings.n} and "
            f"{settings.batch_size}"
        )
    solvers, way = solvers_of(run, settings), way_of(run, settings)
    identity: dict[str, Any] = {
        "kind": "samples",
        "run": run.fingerprint,
        "seed": settings.seed,
        "n": settings.n,
        "batch_size": settings.batch_size,
        **described(run, settings),
        **way.describe(),
    }
    folder = run.folder / "samples" / f"images-{content_key(identity)}"
    if (folder / "manifest.json").is_file():
        return open_store(folder, "image store", identity)
    size = settings.n * math.prod(run.manifest["autoencoder"]["image_shape"])
    there = sum(path.stat().st_size for path in folder.glob("shard-*"))  # of an interrupted one
    require_disk_space(folder, size - there, f"{settings.n} images")
    # a shard is two batches or so: an interruption loses little, and shards stay few
    size = settings.batch_size * max(1, _KEEP_SMALLER_THAN // settings.batch_size)
    writer = StoreWriter(folder, identity, settings.n, size)
    with errors_on_all_ranks(accelerator):
        if accelerator.is_main_process:
            for other, same in begun(folder.parent, identity):
                writer.adopt(other, same)
    autoencoder = run.autoencoder()
    way.flow.to(accelerator.device)
    missing = writer.missing(accelerator.process_index, accelerator.num_processes)
    with errors_on_all_ranks(accelerator):
        for index in progress(missing, len(missing), f"generate ({size} a step)"):
            first, last = writer.bounds(index)
            parts = []
            for start in range(first, last, settings.batch_size):
                count = min(settings.batch_size, last - start)
                place = (settings.seed, "sample", start // settings.batch_size)
                choice = way.choice
                of = None if choice is None else choice.condition(start, count, *place)
                drawn = generator(*place)
                parts.append(_sample(way, autoencoder, count, drawn, solvers, accelerator, of))
            writer.write(index, {"images": torch.cat(parts)})
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        nfe = sample_nfe(way, solvers)
        writer.finish(lambda _: {"nfe": nfe})
    accelerator.wait_for_everyone()
    return open_store(folder, "image store", identity)


def begun(folder: Path, identity: dict[str, Any]) -> list[tuple[StoreReader, int]]:
    """Stores that begin with the same images, and how many of theirs are the same.

    Args:
        folder: where the images of a run lie.
        identity: of the images that are asked for.
    """
    size = identity["batch_size"]  # noise comes by the batch
    if identity["n"] < size:
        return []
    return [
        (other, min(len(other), identity["n"]) // size * size)
        for other in find_similar_stores(folder, identity, "n", min_count=size)
    ]


@torch.inference_mode()
def _sample(
    way: Way,
    autoencoder: Autoencoder,
    count: int,
    drawn: torch.Generator,
    solvers: list[SolverConfig],
    accelerator: Accelerator,
    condition: Condition | None = None,
) -> Tensor:
    noise = torch.randn((count, *way.flow.shape), generator=drawn).to(accelerator.device)
    z = way.run.standardisation.undo(way.flow.decode(noise, solvers, condition=condition))
    autoencoder.to(accelerator.device)  # type: ignore[attr-defined]
    decoded = autoencoder.decode(z)
    if way.refiner is not None:
        decoded = way.refiner.refine(decoded, drawn)
    return to_uint8(decoded).cpu()


def sample_nfe(way: Way, solvers: list[SolverConfig]) -> int:
    """Evaluations of a network per sample, of all blocks and the refiner (on 16 samples)."""
    noise = torch.randn((16, *way.flow.shape), generator=generator(0, "nfe"))
    device = next(way.flow.parameters()).device
    of = None if way.choice is None else way.choice.condition(0, 16, "nfe")
    moved = way.flow.transport(noise.to(device), reverse=True, solver=solvers, condition=of)
    refined = 0 if way.refiner is None else way.refiner.nfe()
    return int(moved.nfe) * way.evaluations + refined
