"""Encoding: a data set into its latent cache, and images outside of any cache.

Rank r of P writes the shards r, r + P, …. An interrupted encoding resumes at missing shards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import yaml
from accelerate import Accelerator
from torch import Tensor

from autoencoders.base import Autoencoder, Moments, to_float, to_uint8
from eval.reconstruction import psnr
from pipeline.config.schema import Config
from pipeline.data.image_set import ImageSet
from pipeline.data.latent_cache import (
    TYPES,
    LatentCache,
    cache_folder,
    cache_identity,
    find_cache,
    latent_bytes,
    load_images_and_autoencoder,
    open_identity,
    read_rows,
    with_precision,
)
from pipeline.data.one_writer import one_writer
from pipeline.data.standardisation import Standardisation, facts
from pipeline.errors import JkoflowError, UserError
from pipeline.runtime.console import Progress
from pipeline.runtime.devices import to_device
from pipeline.runtime.distributed import errors_on_all_ranks, require_same
from pipeline.runtime.system import require_disk_space, require_memory
from pipeline.storage import seal
from pipeline.storage.paths import absolute
from pipeline.storage.records import keep_recipe, read_recipe
from pipeline.storage.shards.manifest import CACHE_RECIPE, MANIFEST, Shard
from pipeline.storage.shards.writer import StoreWriter

#: images whose reconstructions are measured
_MEASURED = 64
#: images that are encoded together outside of a cache
_BATCH = 250


def encode(
    config: Config,
    accelerator: Accelerator,
    progress: Progress,
    precision: str | None = None,
    *,
    elsewhere: bool = True,
) -> LatentCache:
    """Encode a data set, or open its cache if it exists; encoding resumes at missing shards.

    Rank r of P writes the shards r, r + P, ….

    Args:
        config: data, autoencoder and latents.
        accelerator: device and ranks.
        progress: wraps the loop over batches.
        precision: of the stored moments: fp16 or bf16 take half the room of fp32. None is that of
            an existing cache, else fp32.
        elsewhere: whether a copy of the cache in `$JKOFLOW_LATENTS` will do.

    Raises:
        UserError: the data set, the autoencoder or a size is invalid, or a cache in another
            precision exists.
    """
    check_precision(precision)
    images, autoencoder = load_images_and_autoencoder(config)
    identity = cache_identity(config, images, autoencoder)
    folder = cache_folder(identity)
    require_same(accelerator, folder.name, "the latent cache")
    cache = find_cache(folder, identity) if elsewhere else None
    if cache is not None:
        if precision not in (None, cache.precision):
            raise UserError(
                f"latent cache {cache.reader.place} is stored in {cache.precision}; expected "
                f"{precision}; leave --precision out, or delete the cache and encode again"
            )
        if accelerator.is_main_process and read_recipe(folder / CACHE_RECIPE) is None:
            with contextlib.suppress(JkoflowError):  # of a folder that this process cannot write
                keep_recipe(folder / CACHE_RECIPE, recipe_of(config))
        return cache
    if config.latents.batch_size < 1:
        raise UserError(f"latents.batch_size is {config.latents.batch_size}; expected at least 1")
    with one_writer(folder, "latent cache", accelerator, wait=True):
        if not (folder / MANIFEST).is_file():
            stored = with_precision(identity, precision or "fp32")
            _encode(config, stored, images, autoencoder, accelerator, progress)
    return open_identity(folder, identity)


def check_precision(precision: str | None) -> None:
    """Raise UserError for a precision of moments that does not exist."""
    if precision not in (None, *TYPES):
        raise UserError(f"--precision is {precision}; expected one of {', '.join(TYPES)}")


def recipe_of(config: Config) -> bytes:
    """Return a YAML configuration with what decides a cache, which `encode` takes.

    Values that are the defaults are left out, and paths are absolute.
    """
    data, encoder, latents = config.data, config.autoencoder, config.latents
    data = dataclasses.replace(data, path=absolute(data.path))
    encoder = dataclasses.replace(encoder, weights=absolute(encoder.weights))
    sections: dict[str, Any] = {"data": data, "autoencoder": encoder, "latents": latents}
    decides = {"latents": ("mirror", "shard_size", "batch_size")}
    values = {
        name: {
            field.name: getattr(section, field.name)
            for field in dataclasses.fields(section)
            if field.name in decides.get(name, (field.name,))
            and getattr(section, field.name) != getattr(type(section)(), field.name)
        }
        for name, section in sections.items()
    }
    plain = {name: section for name, section in values.items() if section}
    return yaml.safe_dump(plain, sort_keys=False).encode()


def _encode(
    config: Config,
    identity: dict[str, Any],
    images: ImageSet,
    autoencoder: Autoencoder,
    accelerator: Accelerator,
    progress: Progress,
) -> None:
    """Write the missing shards of a cache, and its manifest."""
    precision = identity.get("precision", "fp32")
    folder = cache_folder({k: v for k, v in identity.items() if k != "precision"})
    total = len(images) * (2 if config.latents.mirror else 1)
    written = sum(path.stat().st_size for path in folder.glob("shard-*"))
    one = latent_bytes(autoencoder.latent_shape, autoencoder.stochastic, precision)
    require_disk_space(folder, total * one - written, f"the latents of {total} images")
    batch = min(config.latents.batch_size, config.latents.shard_size, total)
    require_memory(
        4 * batch * math.prod(images.shape), f"a batch of {batch} images of {images.shape}",
        "choose a smaller latents.batch_size or data.size",
    )
    writer = StoreWriter(folder, identity, total, config.latents.shard_size)
    if accelerator.is_main_process:
        seal.start(folder)
        keep_recipe(folder / CACHE_RECIPE, recipe_of(config))
    with errors_on_all_ranks(accelerator):
        _write_shards(
            writer, images, autoencoder, config.latents.batch_size, accelerator, progress
        )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        writer.finish(facts)
    accelerator.wait_for_everyone()


@torch.inference_mode()
def _write_shards(
    writer: StoreWriter,
    images: ImageSet,
    autoencoder: Autoencoder,
    batch_size: int,
    accelerator: Accelerator,
    progress: Progress,
) -> None:
    """Encode and write the missing shards of this rank."""
    missing = writer.missing(accelerator.process_index, accelerator.num_processes)
    jobs = []
    for index in missing:
        first, last = writer.bounds(index)
        starts = range(first, last, batch_size)
        jobs += [(index, start, min(start + batch_size, last)) for start in starts]
    model: Any = autoencoder
    model.to(accelerator.device)
    parts: list[Shard] = []
    for index, start, stop in progress(jobs, len(jobs), "encode"):
        x, labels = read_rows(images, start, stop)
        moments = autoencoder.encode(to_device(to_float(x), accelerator.device))
        parts.append(_to_shard(moments, labels, writer.identity.get("precision", "fp32")))
        if stop == writer.bounds(index)[1]:
            writer.write(index, {k: torch.cat([p[k] for p in parts]) for k in parts[0]})
            parts = []


def _to_shard(moments: Moments, labels: Tensor, precision: str) -> Shard:
    """Return the fields of a batch on the CPU; latents that are not finite are a UserError."""
    mean = moments.mean.cpu().to(TYPES[precision])
    if not bool(torch.isfinite(mean).all()):
        raise UserError(
            f"latents of the autoencoder are not finite in {precision}; expected finite ones; "
            "encode in fp32"
        )
    shard = {"mean": mean, "labels": labels}
    if moments.log_var is not None:
        shard["log_var"] = moments.log_var.cpu().to(TYPES[precision])
    return shard


@torch.inference_mode()
def reconstruction_psnr(config: Config) -> float:
    """Return the mean PSNR in dB of the reconstructions of a data set's first images.

    It shows an autoencoder that was trained on other images before a flow is trained.
    """
    images, autoencoder = load_images_and_autoencoder(config)
    x = torch.from_numpy(np.ascontiguousarray(images.read(0, min(len(images), _MEASURED))))
    decoded = to_uint8(autoencoder.decode(autoencoder.encode(to_float(x)).mean))
    return float(psnr(x, decoded).mean())


@torch.inference_mode()
def storage_error(config: Config, cache: LatentCache) -> tuple[float, float]:
    """Return what storing in half precision changed in the first latents, as root mean squares.

    The first is the error of the means, in units of the channel's standard deviation. The second
    is the relative error of the posterior's standard deviations.
    """
    images, autoencoder = load_images_and_autoencoder(config)
    x = torch.from_numpy(np.ascontiguousarray(images.read(0, min(len(images), _MEASURED))))
    exact, rows = autoencoder.encode(to_float(x)), torch.arange(len(x))
    mean = cache.mean(rows) - cache.standardisation.apply(exact.mean.float())
    std = torch.zeros(1)
    if exact.log_var is not None:
        log_var = cache.reader.take("log_var", rows).float() - exact.log_var.float()
        std = torch.expm1(log_var / 2)
    return float(mean.square().mean().sqrt()), float(std.square().mean().sqrt())


def standardised_latents(
    autoencoder: Autoencoder,
    standardisation: Standardisation,
    noise: float,
    images: ImageSet,
    indices: npt.NDArray[np.int64],
    device: torch.device,
    rng: torch.Generator,
) -> Tensor:
    """Encode images (n,) of a set to standardised latents float32 (n, *shape).

    Args:
        autoencoder: of the latents; its posterior is sampled, if it has one.
        standardisation: of the latents.
        noise: standard deviation of the noise on latents without a posterior.
        images: the set.
        indices: of its images.
        device: of the encoder.
        rng: source of the posterior samples and of the noise.
    """
    moments = _encoded(autoencoder, images, indices, device)
    z = standardisation.apply(moments.sample(rng).cpu())
    if moments.log_var is None and noise > 0:
        z = z + noise * torch.randn(z.shape, generator=rng)
    return z.clone()


@torch.inference_mode()
def _encoded(
    autoencoder: Any,  # noqa: ANN401 - a module with the interface of Autoencoder
    images: ImageSet,
    indices: npt.NDArray[np.int64],
    device: torch.device,
) -> Moments:
    autoencoder.to(device)
    parts = []
    for start in range(0, len(indices), _BATCH):
        x = to_float(torch.from_numpy(images.take(indices[start : start + _BATCH])))
        parts.append(autoencoder.encode(x.to(device)))
    log_vars = [part.log_var for part in parts if part.log_var is not None]
    mean = torch.cat([part.mean for part in parts])
    return Moments(mean, torch.cat(log_vars) if log_vars else None)
