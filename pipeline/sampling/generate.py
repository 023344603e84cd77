"""Sampling: noise goes through the blocks backwards, and the latents are decoded to images.

Images lie in a store inside the run, whose key derives from everything that decides them. So
images are made once, an interrupted command resumes, and any number of processes makes the same
images. A store reuses the images of shorter and longer stores.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from autoencoders.base import Autoencoder, to_uint8
from flows.networks.condition import Condition
from pipeline.data.one_writer import one_writer
from pipeline.errors import UserError
from pipeline.runtime.console import Progress
from pipeline.runtime.distributed import errors_on_all_ranks, require_same
from pipeline.runtime.rng import generator
from pipeline.runtime.system import require_disk_space, require_memory
from pipeline.sampling.image_recipe import recipe_of
from pipeline.sampling.sampling_plan import SamplingPlan
from pipeline.storage import seal
from pipeline.storage.records import keep_recipe
from pipeline.storage.shards.manifest import MANIFEST, RECIPE, content_key
from pipeline.storage.shards.opening import find_similar_stores, open_store
from pipeline.storage.shards.reader import StoreReader
from pipeline.storage.shards.writer import StoreWriter

_KEEP_SMALLER_THAN = 500
_FLOAT = 4


def _identity(plan: SamplingPlan, n: int, seed: int) -> dict[str, Any]:
    """Return everything that decides sampled images."""
    return {
        "kind": "samples",
        "n": n,
        "seed": seed,
        "batch_size": plan.settings.batch_size,
        "sampling": plan.identity(),
    }


def images_folder(plan: SamplingPlan, n: int, seed: int) -> Path:
    """Return the folder in which `sample_images` stores the images."""
    return plan.run.folder / "samples" / f"images-{content_key(_identity(plan, n, seed))}"


def sample_images(
    plan: SamplingPlan, n: int, seed: int, accelerator: Accelerator, progress: Progress
) -> StoreReader:
    """Sample images, or open those that were sampled earlier; rank r makes shards r, r + P, ….

    The store has the field `images`, uint8 (n, C, H, W), and its manifest has `nfe`.

    Raises:
        UserError: n or the batch size is below 1, or the disk is too small.
        SolveError: a solver fails.
    """
    folder = images_folder(plan, n, seed)
    require_same(accelerator, folder.name, "the image store")
    if (folder / MANIFEST).is_file():
        return _sample_images(plan, n, seed, accelerator, progress)
    with one_writer(folder, "image store", accelerator, wait=True):
        return _sample_images(plan, n, seed, accelerator, progress)


def _sample_images(
    plan: SamplingPlan, n: int, seed: int, accelerator: Accelerator, progress: Progress
) -> StoreReader:
    size = plan.settings.batch_size
    for name, number in (("the number of images (-n)", n), ("generate.batch_size", size)):
        if number < 1:
            raise UserError(f"{name} is {number}; expected 1 or more; change it")
    identity, folder = _identity(plan, n, seed), images_folder(plan, n, seed)
    if (folder / MANIFEST).is_file():
        return open_store(folder, "image store", identity)
    total = n * math.prod(plan.run.manifest.require_autoencoder().image_shape)
    written = sum(path.stat().st_size for path in folder.glob("shard-*"))
    require_disk_space(folder, total - written, f"{n} images")
    batch = min(n, size)
    require_memory(
        2 * _FLOAT * batch * math.prod(plan.flow.shape), f"a batch of {batch} samples",
        "choose a smaller generate.batch_size",
    )
    # a shard has about two batches: an interruption loses little, and there are few files
    per_shard = size * max(1, _KEEP_SMALLER_THAN // size)
    writer = StoreWriter(folder, identity, n, per_shard)
    with errors_on_all_ranks(accelerator):
        if accelerator.is_main_process:
            seal.start(folder)
            keep_recipe(folder / RECIPE, recipe_of(plan, n, seed))
            for other, count in stores_to_reuse(folder.parent, identity):
                writer.adopt(other, count)
    autoencoder = plan.run.autoencoder()
    plan.flow.to(accelerator.device)
    missing = writer.missing(accelerator.process_index, accelerator.num_processes)
    with errors_on_all_ranks(accelerator):
        for index in progress(missing, len(missing), f"generate ({per_shard} a step)"):
            first, last = writer.bounds(index)
            parts = []
            for start in range(first, last, size):
                count = min(size, last - start)
                parts.append(sample_batch(plan, autoencoder, start, count, seed))
            writer.write(index, {"images": torch.cat(parts)})
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        nfe = plan.nfe
        writer.finish(lambda _: {"nfe": nfe})
    accelerator.wait_for_everyone()
    return open_store(folder, "image store", identity)


def stores_to_reuse(folder: Path, identity: dict[str, Any]) -> list[tuple[StoreReader, int]]:
    """Find stores that begin with the same images as an identity's, each with their number."""
    size = identity["batch_size"]  # noise is drawn batch by batch
    if identity["n"] < size:
        return []
    return [
        (other, min(len(other), identity["n"]) // size * size)
        for other in find_similar_stores(folder, identity, "n", min_count=size)
    ]


@torch.inference_mode()
def sample_batch(
    plan: SamplingPlan, autoencoder: Autoencoder | None, start: int, count: int, seed: int
) -> Tensor:
    """Sample the images start … start + count − 1 of a seed, uint8 (count, C, H, W).

    `start` is a multiple of the plan's batch size, which decides the noise of each image. The
    device is that of the plan's flow.
    """
    stream = (seed, "sample", start // plan.settings.batch_size)
    rng = generator(*stream)
    noise = torch.randn((count, *plan.flow.shape), generator=rng)
    return images_from_noise(plan, autoencoder, noise, plan.condition(start, count, *stream), rng)


@torch.inference_mode()
def images_from_noise(
    plan: SamplingPlan,
    autoencoder: Autoencoder | None,
    noise: Tensor,
    condition: Condition | None,
    rng: torch.Generator,
) -> Tensor:
    """Carry noise (n, *shape) to images uint8 (n, C, H, W), on the CPU; `rng` is the refiner's."""
    device = next(plan.flow.parameters()).device
    z = plan.flow.decode(noise.to(device), list(plan.solvers), condition=condition)
    return images_from_latents(plan, autoencoder, z, rng)


@torch.inference_mode()
def images_from_latents(
    plan: SamplingPlan, autoencoder: Autoencoder | None, z: Tensor, rng: torch.Generator | None
) -> Tensor:
    """Decode standardised latents (n, *shape) to images uint8 (n, C, H, W), on the CPU.

    The plan's refiner adds detail from the noise of `rng`; without one it is left out. The samples
    of a run on a caller's own tensors, without an autoencoder, stay float (n, *shape).
    """
    latents = plan.run.standardisation.undo(z)
    if autoencoder is None:
        return latents.cpu()
    autoencoder.to(z.device)  # type: ignore[attr-defined]
    decoded = autoencoder.decode(latents)
    if plan.refiner is not None and rng is not None:
        decoded = plan.refiner.sample_detail(decoded, rng)
    return to_uint8(decoded).cpu()
