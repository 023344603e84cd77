"""Latent caches: the latents of a data set under one autoencoder, and their standardisation.

A cache is a store of `mean` (n, C_z, H_z, W_z), for a KL autoencoder `log_var` of the same shape,
and `labels` (n,). With `latents.mirror`, the latents of the n mirror images follow. Its manifest
holds the standardisation, whose std includes the posterior's variance.
"""

from __future__ import annotations

import contextlib
import math
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from torch import Tensor

from autoencoders.adapt import Adaptation
from autoencoders.base import Autoencoder, Moments, to_float, to_uint8
from autoencoders.registry import build_autoencoder
from autoencoders.weights import load_weights, locate_weights
from eval.reconstruction import psnr
from pipeline.config.data import LATENTS
from pipeline.config.schema import Config, EncoderConfig
from pipeline.data.datasets import load_images
from pipeline.data.image_set import ImageSet
from pipeline.data.one_writer import one_writer
from pipeline.data.standardisation import Standardisation, class_counts, facts
from pipeline.errors import UserError
from pipeline.runtime.console import Progress
from pipeline.runtime.devices import to_device
from pipeline.runtime.distributed import errors_on_all_ranks, require_same
from pipeline.runtime.system import require_disk_space, require_memory
from pipeline.storage import atomic, seal
from pipeline.storage.paths import data_root
from pipeline.storage.remote_shards import find_remote_store, is_url, open_remote_store
from pipeline.storage.shards import (
    FORMAT,
    MANIFEST,
    Shard,
    StoreReader,
    StoreWriter,
    content_key,
    open_store,
    require_identity,
)

#: environment variable with a folder or an address of caches that are not under the data root
PLACE = "JKOFLOW_LATENTS"
#: types of the stored moments by precision
_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
#: images whose reconstructions are measured
_MEASURED = 64
#: images that are encoded together outside of a cache
_BATCH = 250


class LatentCache:
    """Latent cache of a data set, from its complete, verified store."""

    def __init__(self, reader: StoreReader) -> None:
        self.reader = reader
        try:
            self.standardisation = Standardisation.from_dict(reader.manifest["standardisation"])
            identity = dict(reader.manifest["identity"])
            self.shape = tuple(int(side) for side in identity["latent_shape"])
            self.stochastic = bool(identity["stochastic"])
            self.precision = str(identity.get("precision", "fp32"))
            _check_fields(reader, self.shape, self.stochastic, len(self.standardisation.mean))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(
                f"the manifest of the latent cache {reader.place} does not describe its shards "
                f"({error}); {seal.advice(reader.folder / MANIFEST)}"
            ) from error

    def __len__(self) -> int:
        return len(self.reader)

    @property
    def key(self) -> str:
        """Key of the store."""
        return str(self.reader.manifest["key"])

    def labels(self) -> Tensor:
        """Return the class of every latent, int64 (n,); -1 without classes."""
        return self.reader.field("labels")

    @cached_property
    def class_counts(self) -> dict[int, int]:
        """Number of latents of every class, by class; -1 without classes.

        The manifest has it. For a cache of an earlier version the labels are counted.
        """
        stored = self.reader.manifest.get("classes")
        return class_counts(self.reader) if stored is None else {int(k): n for k, n in stored}

    def sample(self, start: int, stop: int, noise: float, generator: torch.Generator) -> Tensor:
        """Sample the standardised latents of images [start, stop), float32 (n, C_z, H_z, W_z).

        A KL autoencoder's posterior is sampled. Latents of a deterministic encoder get Gaussian
        noise of std `noise`, in standardised units.
        """
        mean = self.reader.read("mean", start, stop).float()
        if self.stochastic:
            moments = Moments(mean, self.reader.read("log_var", start, stop).float())
            return self.standardisation.apply(moments.sample(generator))
        z = self.standardisation.apply(mean)
        return z + noise * torch.randn(z.shape, generator=generator) if noise > 0 else z

    def moments(self, start: int, stop: int, noise: float) -> tuple[Tensor, Tensor]:
        """Return the mean and the standard deviation of what `sample` draws.

        The arguments are those of `sample`. Both results are float32 (n, C_z, H_z, W_z), in
        standardised units, with n = stop − start.
        """
        rows = torch.arange(start, stop)
        return self.mean(rows), self.std(rows, noise)

    def mean(self, rows: Tensor) -> Tensor:
        """Return the standardised means of rows int64 (n,), float32 (n, *shape)."""
        return self.standardisation.apply(self.reader.take("mean", rows).float())

    def std(self, rows: Tensor, noise: float) -> Tensor:
        """Return the standard deviations of rows (n,) in standardised units, (n, *shape)."""
        if not self.stochastic:
            return torch.full((len(rows), *self.shape), noise)
        log_var = self.reader.take("log_var", rows).float()
        return self.standardisation.scale((log_var / 2).exp())


def _check_fields(
    reader: StoreReader, shape: tuple[int, ...], stochastic: bool, channels: int
) -> None:
    """Check that every shard has the latents that the manifest describes.

    Raises:
        ValueError: a shard has another field or another shape.
    """
    fields = {"mean": shape, "labels": (), **({"log_var": shape} if stochastic else {})}
    if not shape or shape[0] != channels:
        raise ValueError(f"latents have the shape {shape}, and {channels} channels have a mean")

    def check(index: int) -> None:
        shapes, count = reader.shapes(index), reader.manifest["shards"][index]["count"]
        for name, sides in fields.items():
            if shapes.get(name) != (count, *sides):
                raise ValueError(f"{name} of shard {index} is not of shape {(count, *sides)}")

    reader.check_shards(check)


def cache_identity(config: Config, images: ImageSet, autoencoder: Autoencoder) -> dict[str, Any]:
    """Return the identity of a cache: its content and its inputs."""
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


def latent_bytes(shape: tuple[int, ...], stochastic: bool, precision: str = "fp32") -> int:
    """Return the bytes of the moments of a latent of a shape in the cache."""
    return _TYPES[precision].itemsize * math.prod(shape) * (2 if stochastic else 1)


def cache_folder(identity: dict[str, Any]) -> Path:
    """Return the folder of the cache of an identity."""
    return data_root() / "latents" / f"{identity['dataset']}-{content_key(identity)}"


def encode(
    config: Config, accelerator: Accelerator, progress: Progress, precision: str | None = None
) -> LatentCache:
    """Encode a data set, or open its cache if it exists; encoding resumes at missing shards.

    Rank r of P writes the shards r, r + P, ….

    Args:
        config: data, autoencoder and latents.
        accelerator: device and ranks.
        progress: wraps the loop over batches.
        precision: of the stored moments: fp16 or bf16 take half the room of fp32. None is that of
            an existing cache, else fp32.

    Raises:
        UserError: the data set, the autoencoder or a size is invalid, or a cache in another
            precision exists.
    """
    if precision not in (None, *_TYPES):
        raise UserError(f"--precision is {precision}; expected one of {', '.join(_TYPES)}")
    images, autoencoder = load_images_and_autoencoder(config)
    identity = cache_identity(config, images, autoencoder)
    folder = cache_folder(identity)
    require_same(accelerator, folder.name, "the latent cache")
    cache = _existing(folder, identity)
    if cache is not None:
        if precision not in (None, cache.precision):
            raise UserError(
                f"latent cache {cache.reader.place} is stored in {cache.precision}; expected "
                f"{precision}; leave --precision out, or delete the cache and encode again"
            )
        return cache
    if config.latents.batch_size < 1:
        raise UserError(f"latents.batch_size is {config.latents.batch_size}; expected at least 1")
    with one_writer(folder, "latent cache", accelerator, wait=True):
        if not (folder / MANIFEST).is_file():
            stored = _identity_in(identity, precision or "fp32")
            _encode(config, stored, images, autoencoder, accelerator, progress)
    return _open(folder, identity)


def _identity_in(identity: dict[str, Any], precision: str) -> dict[str, Any]:
    """Return the identity of a cache whose moments are stored in a precision."""
    return identity if precision == "fp32" else {**identity, "precision": precision}


def _open(folder: Path, identity: dict[str, Any]) -> LatentCache:
    """Open the cache of an identity, which may be stored in any precision."""
    with contextlib.suppress(UserError, AttributeError, TypeError):  # `open_store` says what
        stored = atomic.read_json(folder / MANIFEST, "manifest").get("identity")
        identity = _identity_in(identity, stored.get("precision", "fp32"))
    return LatentCache(open_store(folder, "latent cache", identity))


def _existing(folder: Path, identity: dict[str, Any]) -> LatentCache | None:
    """Open the cache of an identity, under the data root or in `$JKOFLOW_LATENTS`; or None."""
    if (folder / MANIFEST).is_file():
        return _open(folder, identity)
    place = os.environ.get(PLACE)
    if not place:
        return None
    if not is_url(place):
        other = Path(place).expanduser() / folder.name
        return _open(other, identity) if (other / MANIFEST).is_file() else None
    reader = find_remote_store(f"{place.rstrip('/')}/{folder.name}", "latent cache")
    if reader is None:
        return None
    stored = dict(reader.manifest.get("identity") or {})
    expected = _identity_in(identity, str(stored.get("precision", "fp32")))
    require_identity(reader.manifest, expected, reader.url, "latent cache")
    return LatentCache(reader)


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
    size = total * one - written
    require_disk_space(folder, size, f"the latents of {total} images")
    batch = min(config.latents.batch_size, config.latents.shard_size, total)
    require_memory(
        4 * batch * math.prod(images.shape), f"a batch of {batch} images of {images.shape}",
        "choose a smaller latents.batch_size or data.size",
    )
    writer = StoreWriter(folder, identity, total, config.latents.shard_size)
    size = config.latents.batch_size
    with errors_on_all_ranks(accelerator):
        _write_shards(writer, images, autoencoder, size, accelerator, progress)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        writer.finish(facts)
    accelerator.wait_for_everyone()


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


def open_cache(config: Config) -> LatentCache:
    """Open the cache that `encode` made of a configuration.

    Raises:
        UserError: the cache is absent or damaged.
    """
    if config.data.name == LATENTS:
        place = str(config.data.path)
        if is_url(place):
            return LatentCache(open_remote_store(place, "latent cache"))
        return LatentCache(open_store(Path(place), "latent cache"))
    images, autoencoder = load_images_and_autoencoder(config)
    identity = cache_identity(config, images, autoencoder)
    folder = cache_folder(identity)
    cache = _existing(folder, identity)
    if cache is None:
        raise UserError(
            f"latent cache {folder} of {images.name} ({images.split}) does not exist; run "
            "`jkoflow encode` with the same configuration first"
        )
    return cache


def load_images_and_autoencoder(config: Config) -> tuple[ImageSet, Autoencoder]:
    """Open the data set and build the autoencoder of a configuration for its images."""
    images = load_images(config.data)
    return images, build_encoder(config.autoencoder, images.shape)


def build_encoder(settings: EncoderConfig, image_shape: tuple[int, int, int]) -> Autoencoder:
    """Build the autoencoder of some settings for images of a shape (C, H, W)."""
    adaptation = Adaptation(settings.fit, settings.size, settings.latents)
    return build_autoencoder(settings.name, settings.weights, image_shape, adaptation)


def autoencoder_of_latents(config: Config, shape: tuple[int, ...]) -> Autoencoder | None:
    """Return a configuration's autoencoder if its latents have a shape (C_z, H_z, W_z).

    Its images have the shape that the weights were made for.
    """
    settings = config.autoencoder
    if settings.name != "pretrained" or settings.weights is None:
        return None
    model = load_weights(locate_weights(settings.weights))
    return model if tuple(model.latent_shape) == tuple(shape) else None


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


def read_rows(images: ImageSet, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Read images (B, C, H, W) and labels (B,) of rows [start, stop); rows ≥ n are mirrored."""
    rows = np.arange(start, stop)
    indices, mirrored = rows % len(images), torch.from_numpy(rows >= len(images))
    x = torch.from_numpy(images.take(indices))
    x[mirrored] = x[mirrored].flip(-1)
    labels = np.full(len(x), -1) if images.labels is None else images.labels[indices]
    return x, torch.from_numpy(labels)


def _to_shard(moments: Moments, labels: Tensor, precision: str) -> Shard:
    """Return the fields of a batch on the CPU; latents that are not finite are a UserError."""
    mean = moments.mean.cpu().to(_TYPES[precision])
    if not bool(torch.isfinite(mean).all()):
        raise UserError(
            f"latents of the autoencoder are not finite in {precision}; expected finite ones; "
            "encode in fp32"
        )
    shard = {"mean": mean, "labels": labels}
    if moments.log_var is not None:
        shard["log_var"] = moments.log_var.cpu().to(_TYPES[precision])
    return shard
