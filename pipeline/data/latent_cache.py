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
import torch
from torch import Tensor

from autoencoders.adapt import Adaptation
from autoencoders.base import Autoencoder, Moments
from autoencoders.registry import build_autoencoder
from autoencoders.weights import load_weights, locate_weights
from pipeline.config.data import LATENTS
from pipeline.config.schema import Config, EncoderConfig
from pipeline.data.datasets import load_images
from pipeline.data.image_set import ImageSet
from pipeline.data.standardisation import Standardisation, class_counts
from pipeline.errors import UserError
from pipeline.storage import atomic, seal
from pipeline.storage.paths import data_root
from pipeline.storage.remote_files import is_url
from pipeline.storage.shards.manifest import FORMAT, MANIFEST, content_key, require_identity
from pipeline.storage.shards.opening import open_store
from pipeline.storage.shards.reader import StoreReader
from pipeline.storage.shards.remote import find_remote_store, open_remote_store

#: environment variable with a folder or an address of caches that are not under the data root
PLACE = "JKOFLOW_LATENTS"
#: types of the stored moments by precision
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


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
    return TYPES[precision].itemsize * math.prod(shape) * (2 if stochastic else 1)


def cache_folder(identity: dict[str, Any]) -> Path:
    """Return the folder of the cache of an identity."""
    return data_root() / "latents" / f"{identity['dataset']}-{content_key(identity)}"


def with_precision(identity: dict[str, Any], precision: str) -> dict[str, Any]:
    """Return the identity of the cache that stores the same moments in a precision."""
    return identity if precision == "fp32" else {**identity, "precision": precision}


def open_identity(folder: Path, identity: dict[str, Any]) -> LatentCache:
    """Open the cache of an identity, which may be stored in any precision."""
    with contextlib.suppress(UserError, AttributeError, TypeError):  # `open_store` says what
        stored = atomic.read_json(folder / MANIFEST, "manifest").get("identity")
        identity = with_precision(identity, stored.get("precision", "fp32"))
    return LatentCache(open_store(folder, "latent cache", identity))


def find_cache(folder: Path, identity: dict[str, Any]) -> LatentCache | None:
    """Open the cache of an identity, under the data root or in `$JKOFLOW_LATENTS`; or None."""
    if (folder / MANIFEST).is_file():
        return open_identity(folder, identity)
    place = os.environ.get(PLACE)
    if not place:
        return None
    if not is_url(place):
        other = Path(place).expanduser() / folder.name
        return open_identity(other, identity) if (other / MANIFEST).is_file() else None
    reader = find_remote_store(f"{place.rstrip('/')}/{folder.name}", "latent cache")
    if reader is None:
        return None
    stored = dict(reader.manifest.get("identity") or {})
    expected = with_precision(identity, str(stored.get("precision", "fp32")))
    require_identity(reader.manifest, expected, reader.url, "latent cache")
    return LatentCache(reader)


def open_cache(config: Config) -> LatentCache:
    """Open the cache that `encode` made of a configuration.

    Raises:
        UserError: the cache is absent or damaged.
    """
    if config.data.name == LATENTS:
        place = config.data.path
        if not place:
            raise UserError("data.path is null; set it to the latent cache of data.name=latents")
        if is_url(place):
            return LatentCache(open_remote_store(place, "latent cache"))
        return LatentCache(open_store(Path(place).expanduser(), "latent cache"))
    images, autoencoder = load_images_and_autoencoder(config)
    identity = cache_identity(config, images, autoencoder)
    folder = cache_folder(identity)
    cache = find_cache(folder, identity)
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


def read_rows(images: ImageSet, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Read images (B, C, H, W) and labels (B,) of rows [start, stop); rows ≥ n are mirrored."""
    rows = np.arange(start, stop)
    indices, mirrored = rows % len(images), torch.from_numpy(rows >= len(images))
    x = torch.from_numpy(images.take(indices))
    x[mirrored] = x[mirrored].flip(-1)
    labels = np.full(len(x), -1) if images.labels is None else images.labels[indices]
    return x, torch.from_numpy(labels)
