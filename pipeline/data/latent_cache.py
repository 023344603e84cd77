"""The latent cache: a data set encoded once by one autoencoder, content-addressed.

A cache holds `mean` (n, C_z, H_z, W_z), for a KL autoencoder `log_var` of the same shape, and
`labels` (n,); with `latents.mirror` the mirror images follow as a second n. Its manifest holds
the standardisation (per-channel mean and std of the latents as the flow sees them, that is with
the posterior's variance), which decoding undoes, so that nobody can decode mis-scaled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from autoencoders.adapt import Adaptation
from autoencoders.base import Autoencoder, Moments, to_float
from autoencoders.registry import build_autoencoder
from pipeline.config.schema import Config
from pipeline.data.datasets import ImageSet, load_images
from pipeline.data.standardisation import Standardisation
from pipeline.errors import UserError
from pipeline.runtime.console import Progress
from pipeline.runtime.distributed import errors_on_all_ranks
from pipeline.storage.paths import data_root
from pipeline.storage.shards import (
    FORMAT,
    Shard,
    StoreReader,
    StoreWriter,
    content_key,
    open_store,
)


class LatentCache:
    """A whole latent cache.

    Args:
        reader: its verified store.
    """

    def __init__(self, reader: StoreReader) -> None:
        self.reader = reader
        self.standardisation = Standardisation.from_dict(reader.manifest["standardisation"])
        self.shape: tuple[int, ...] = tuple(reader.manifest["identity"]["latent_shape"])
        self.stochastic: bool = reader.manifest["identity"]["stochastic"]

    def __len__(self) -> int:
        return len(self.reader)

    @property
    def key(self) -> str:
        """Content address."""
        return str(self.reader.manifest["key"])

    def labels(self) -> Tensor:
        """The class of every latent, int64 (n,); -1 where the data set has none."""
        return self.reader.take("labels", torch.arange(len(self)))

    def draw(self, start: int, stop: int, noise: float, generator: torch.Generator) -> Tensor:
        """Standardised latents [start, stop): posterior samples, or with a known noise.

        Args:
            start: first image.
            stop: one past the last.
            noise: std of the Gaussian noise for a deterministic encoder (standardised units).
            generator: draws the sample or the noise.

        Returns:
            float32 (stop - start, C_z, H_z, W_z).
        """
        mean = self.reader.read("mean", start, stop)
        if self.stochastic:
            moments = Moments(mean, self.reader.read("log_var", start, stop))
            return self.standardisation.apply(moments.sample(generator))
        z = self.standardisation.apply(mean)
        return z + noise * torch.randn(z.shape, generator=generator) if noise > 0 else z


def identity_of(config: Config, images: ImageSet, autoencoder: Autoencoder) -> dict[str, Any]:
    """What a cache holds and was made from; its key is the digest of this."""
    return {
        "kind": "latents",
        "format": FORMAT,
        "data": images.fingerprint,
        "dataset": images.name,
        "split": images.split,
        "count": len(images),
        "autoencoder": autoencoder.fingerprint,
        "latent_shape": list(autoencoder.latent_shape),
        "stochastic": autoencoder.stochastic,
        "mirror": config.latents.mirror,
        "shard_size": config.latents.shard_size,
        "batch_size": config.latents.batch_size,
    }


def folder_of(identity: dict[str, Any]) -> Path:
    """Where the cache of an identity lies."""
    return data_root() / "latents" / f"{identity['dataset']}-{content_key(identity)}"


def encode(config: Config, accelerator: Accelerator, progress: Progress) -> LatentCache:
    """Encode a data set, or open its cache where there is one; resumes at the missing shards.

    Args:
        config: data, autoencoder and latents sections.
        accelerator: device and processes; rank r writes shards r, r + P, ….
        progress: wraps the loop over batches.

    Returns:
        The whole, verified cache.

    Raises:
        UserError: bad data set, autoencoder or sizes.
    """
    images, autoencoder = load_parts(config)
    identity = identity_of(config, images, autoencoder)
    folder = folder_of(identity)
    if (folder / "manifest.json").is_file():
        return LatentCache(open_store(folder, "latent cache", identity))
    if config.latents.batch_size < 1:
        raise UserError(f"latents.batch_size must be at least 1, not {config.latents.batch_size}")
    total = len(images) * (2 if config.latents.mirror else 1)
    writer = StoreWriter(folder, identity, total, config.latents.shard_size)
    with errors_on_all_ranks(accelerator):
        _write_shards(
            writer, images, autoencoder, config.latents.batch_size, accelerator, progress
        )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        writer.finish(lambda reader: {"standardisation": _standardise(reader).to_dict()})
    accelerator.wait_for_everyone()
    return LatentCache(open_store(folder, "latent cache", identity))


def open_cache(config: Config) -> LatentCache:
    """The cache that `encode` made of this configuration.

    Raises:
        UserError: it is absent or damaged.
    """
    images, autoencoder = load_parts(config)
    identity = identity_of(config, images, autoencoder)
    folder = folder_of(identity)
    if not (folder / "manifest.json").is_file():
        raise UserError(
            f"no finished latent cache of {images.name} ({images.split}) at {folder}; run "
            "`jkoflow encode` with the same configuration first"
        )
    return LatentCache(open_store(folder, "latent cache", identity))


def load_parts(config: Config) -> tuple[ImageSet, Autoencoder]:
    """The data set and the autoencoder of a configuration, checked against each other."""
    images = load_images(config.data)
    wanted = config.autoencoder
    adaptation = Adaptation(wanted.fit, wanted.size, wanted.latents)
    return images, build_autoencoder(wanted.name, wanted.weights, images.shape, adaptation)


@torch.inference_mode()
def _write_shards(
    writer: StoreWriter,
    images: ImageSet,
    autoencoder: Autoencoder,
    batch_size: int,
    accelerator: Accelerator,
    progress: Progress,
) -> None:
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
        x, labels = image_rows(images, start, stop)
        moments = autoencoder.encode(to_float(x).to(accelerator.device))
        parts.append(_to_shard(moments, labels))
        if stop == writer.bounds(index)[1]:
            writer.write(index, {k: torch.cat([p[k] for p in parts]) for k in parts[0]})
            parts = []


def image_rows(images: ImageSet, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Images and labels of rows [start, stop) of a cache; rows from n on are mirror images."""
    n, rows, labels = len(images), [], []
    for low, high, mirrored in ((start, min(stop, n), False), (max(start, n), stop, True)):
        if low < high:
            offset = n if mirrored else 0
            x = torch.from_numpy(np.ascontiguousarray(images.read(low - offset, high - offset)))
            rows.append(x.flip(-1) if mirrored else x)
            known = images.labels
            fill = (
                np.full(high - low, -1) if known is None else known[low - offset : high - offset]
            )
            labels.append(torch.from_numpy(np.asarray(fill, np.int64)))
    return torch.cat(rows), torch.cat(labels)


def _to_shard(moments: Moments, labels: Tensor) -> Shard:
    if not bool(torch.isfinite(moments.mean).all()):
        raise UserError("the autoencoder gave latents that are not finite; encode in float32")
    shard = {"mean": moments.mean.float().cpu(), "labels": labels}
    if moments.log_var is not None:
        shard["log_var"] = moments.log_var.float().cpu()
    return shard


def _standardise(reader: StoreReader) -> Standardisation:
    """Per-channel mean and std in float64, the posterior's variance included.

    Var[z] = Var[mean] + E[exp(log_var)].
    """
    count, total, square = 0, torch.zeros(()).double(), torch.zeros(()).double()
    for index in range(len(reader.manifest["shards"])):
        shard = reader.shard(index)
        mean = shard["mean"].double()
        spread = shard["log_var"].double().exp() if "log_var" in shard else 0.0
        count += mean[:, 0].numel()
        total = total + mean.sum((0, 2, 3))
        square = square + (mean**2 + spread).sum((0, 2, 3))
    average = total / count
    std = (square / count - average**2).clamp(min=1e-12).sqrt()
    return Standardisation(average.float(), std.clamp(min=1e-6).float())
