"""Sample sources: where the samples of stage 0 come from.

`LatentSource` draws the latents of a cache. `ResidualSource` is for refiners: the latents of an
image x are drawn from their posterior, disturbed by noise, and decoded to c. The samples are the
standardised residuals x − c, each conditioned on c (`flows.networks.image_condition`).
"""

from __future__ import annotations

import dataclasses
import math
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from autoencoders.adapt import Adaptation
from autoencoders.base import to_float
from pipeline.config.data import LATENTS, LatentsConfig
from pipeline.config.schema import Config
from pipeline.data.drawn_latents import MANY, DrawnLatents
from pipeline.data.latent_cache import (
    autoencoder_of_latents,
    load_images_and_autoencoder,
    open_cache,
    read_rows,
)
from pipeline.data.standardisation import Standardisation
from pipeline.errors import UserError
from pipeline.runs.manifest import AutoencoderRecord, DataRecord, LatentsRecord, Manifest
from pipeline.runtime.console import estimate_whole, progress_bar
from pipeline.runtime.rng import generator
from pipeline.storage.shards.manifest import Shard
from pipeline.storage.shards.reader import StoreReader
from pipeline.storage.shards.writer import StoreWriter
from pipeline.training.batches.matching_loss import IMAGE
from pipeline.training.stages import (
    ensure_drawn_stage,
    ensure_stage,
    has_stored_stage,
    samples_left,
)

#: images in each part of the cache that the standardisation is measured on, and number of parts
_IMAGES_PER_PART, _PARTS = 50, 20
#: images decoded at once
_BATCH = 250
#: seed of the draws of latents, the same in all runs
_SEED = 0


class SampleSource(Protocol):
    """Source of the samples of stage 0.

    Attributes:
        shape: of one sample, (C_z, H_z, W_z) or (D,).
        class_counts: number of data of each class, by class, which is negative for unlabelled
            ones. It is read only if velocity.classes is set.
    """

    shape: tuple[int, ...]

    @property
    def class_counts(self) -> dict[int, int]:
        """Return the number of data of each class; empty without classes."""

    def first_stage(self, run: Path, config: Config, accelerator: Accelerator) -> StoreReader:
        """Open stage 0 of a run; it is made where it is missing."""

    def manifest(self, name: str) -> Manifest:
        """Return the manifest of a run on these samples, without passes.

        Args:
            name: of the run's configuration.
        """


class LatentSource:
    """Samples of the latents in the cache of a configuration.

    Args:
        config: sections data, autoencoder and latents.

    Raises:
        UserError: the cache is absent or damaged, or its latents have both a posterior and noise.
    """

    def __init__(self, config: Config) -> None:
        self.config, self.cache = config, open_cache(config)
        self.shape = self.cache.shape
        if self.cache.stochastic and config.latents.noise > 0:
            raise UserError(
                f"latents.noise is {config.latents.noise:g}; expected 0, because these latents "
                "are drawn from the posteriors of their images; remove it"
            )

    @property
    def class_counts(self) -> dict[int, int]:
        """Return the number of images of each class, mirror images included."""
        return self.cache.class_counts

    def first_stage(self, run: Path, config: Config, accelerator: Accelerator) -> StoreReader:
        """Open stage 0: `latents.draws` draws of each latent.

        Under jko it holds the mean and the standard deviation of every draw, too, where they are
        random. The first block draws its samples again in every batch. From `MANY` samples on,
        nothing is stored but the manifest.
        """
        cache, latents = self.cache, config.latents
        identity = self.identity(latents)
        random = config.jko is not None and (cache.stochastic or latents.noise > 0)
        if random:
            identity["moments"] = True
        count, size = len(cache) * latents.draws, latents.shard_size
        if count >= MANY and not has_stored_stage(run):
            identity["drawn"] = "counters"
            drawn = DrawnLatents(cache, latents.draws, latents.noise, identity)
            return ensure_drawn_stage(run, drawn, accelerator)

        def make(writer: StoreWriter, index: int) -> Shard:
            source = generator(_SEED, "draw", index)
            rows = self.rows(*writer.bounds(index))
            shard = {"z": torch.cat([cache.sample(*span, latents.noise, source) for span in rows])}
            if random:
                moments = [cache.moments(*span, latents.noise) for span in rows]
                shard["mean"], shard["std"] = map(torch.cat, zip(*moments, strict=True))
            return shard

        if not config.velocity.classes:
            return ensure_stage(run, identity, count, size, make, accelerator)

        def labels(first: int, last: int) -> torch.Tensor:
            return cache.reader.take("labels", torch.arange(first, last) % len(cache))

        return ensure_stage(run, identity, count, size, make, accelerator, labels=labels)

    def identity(self, latents: LatentsConfig) -> dict[str, Any]:
        """Return everything that decides the samples of stage 0."""
        return {
            "kind": "stage",
            "stage": 0,
            "latents": self.cache.key,
            "draws": latents.draws,
            "noise": latents.noise,
            "seed": _SEED,
            "shape": list(self.shape),
        }

    def rows(self, first: int, last: int, most: int | None = None) -> list[tuple[int, int]]:
        """Return the rows of the cache that samples [first, last) are draws of.

        Args:
            first: sample; from the size of the cache on, samples are further draws.
            last: one past the last.
            most: largest number of rows in a span; None is without limit.

        Returns:
            spans (start, stop) of rows, in order.
        """
        spans = []
        while first < last:
            row = first % len(self.cache)
            stop = min(row + min(most or last, last - first), len(self.cache))
            spans.append((row, stop))
            first += stop - row
        return spans

    def manifest(self, name: str) -> Manifest:
        """Return the manifest of a run on these samples, without passes.

        A run on a caller's own latents has an autoencoder if its latents have the same shape.
        """
        if self.config.data.name == LATENTS:
            identity = self.cache.reader.manifest["identity"]
            data = DataRecord(LATENTS, "train", str(identity["data"]), count=len(self.cache))
            autoencoder = autoencoder_of_latents(self.config, self.shape)
            names = None
        else:
            images, autoencoder = load_images_and_autoencoder(self.config)
            data = DataRecord(images.name, images.split, images.fingerprint)
            names = images.class_names
        settings, classes = self.config.autoencoder, self.config.velocity.classes
        return Manifest(
            name,
            self.shape,
            self.cache.standardisation,
            data,
            LatentsRecord(self.cache.key, self.config.latents.noise, self.cache.stochastic),
            None
            if autoencoder is None
            else AutoencoderRecord(
                settings.name,
                settings.weights,
                autoencoder.fingerprint,
                autoencoder.image_shape,
                Adaptation(settings.fit, settings.size, settings.latents),
            ),
            class_names=list(names) if classes and names else None,
        )


class ResidualSource(LatentSource):
    """Residuals (C, H, W) of the images of a latent cache, conditioned on the decoded images.

    Args:
        config: sections data, autoencoder, latents and velocity.

    Raises:
        UserError: the cache is absent or damaged, or `velocity.image_channels` is not the number
            of channels of the images.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.images, self.autoencoder = load_images_and_autoencoder(config)
        self.shape = self.images.shape
        if config.velocity.image_channels != self.shape[0]:
            raise UserError(
                f"velocity.image_channels is {config.velocity.image_channels}, but "
                f"{self.images.name} has images of {self.shape[0]} channels; a refiner is "
                f"conditioned on the decoded image, so set it to {self.shape[0]}"
            )

    @cached_property
    def standardisation(self) -> Standardisation:
        """Standardisation of the residuals, by channel, rounded to three digits of the deviation.

        It is measured on images from all parts of the cache. Rounding makes it the same on every
        processor.
        """
        source, parts = generator("residuals"), []
        for index in progress_bar(range(_PARTS), _PARTS, "measure residuals"):
            start = index * len(self.cache) // _PARTS
            stop = min(start + _IMAGES_PER_PART, (index + 1) * len(self.cache) // _PARTS)
            if start < stop:
                parts.append(self.pairs(start, stop, source))
        x, decoded = (torch.cat(part) for part in zip(*parts, strict=True))
        residuals = (x - decoded).double().transpose(0, 1).flatten(1)
        mean, std = residuals.mean(1), residuals.std(1).clamp(min=1e-3)
        unit = 10.0 ** (torch.floor(torch.log10(std)) - 2)
        return Standardisation(*((unit * (x / unit).round()).float() for x in (mean, std)))

    def first_stage(self, run: Path, config: Config, accelerator: Accelerator) -> StoreReader:
        """Open stage 0: residuals of `latents.draws` draws of each latent, in float16."""
        latents = config.latents
        residuals = self.standardisation.to_dict()
        identity = self.identity(latents) | {"disturb": latents.disturb, "residuals": residuals}
        self.autoencoder.to(accelerator.device)  # type: ignore[attr-defined]

        def make(writer: StoreWriter, index: int) -> Shard:
            source = generator(_SEED, "residuals", index)
            spans, parts = self.rows(*writer.bounds(index), _BATCH), []
            bar = progress_bar(spans, len(spans), f"decode shard {index}")
            left = samples_left(writer, index, accelerator.num_processes)
            estimate_whole(bar, "decode", math.ceil(left / _BATCH), "batch")
            for row, stop in bar:
                x, decoded = self.pairs(row, stop, source)
                z = self.standardisation.apply(x - decoded)
                parts.append((z.half(), decoded.half()))
            z, decoded = (torch.cat(part) for part in zip(*parts, strict=True))
            return {"z": z, IMAGE: decoded}

        count = len(self.cache) * latents.draws
        return ensure_stage(run, identity, count, latents.shard_size, make, accelerator)

    def manifest(self, name: str) -> Manifest:
        """Return the manifest of a run, with the standardisation of the residuals."""
        manifest = super().manifest(name)
        assert manifest.latents is not None
        latents = dataclasses.replace(manifest.latents, disturb=self.config.latents.disturb)
        return dataclasses.replace(
            manifest, latents=latents, standardisation=self.standardisation
        )

    @torch.inference_mode()
    def pairs(self, start: int, stop: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return images and the decodings of their latents.

        Args:
            start: first row of the cache.
            stop: one past the last.
            source: of the posterior draws and the noise.

        Returns:
            both (stop − start, C, H, W), in [-1, 1]; the second is rounded to float16.
        """
        latents = self.config.latents
        z = self.cache.sample(start, stop, latents.noise, source)
        if latents.disturb:
            most = latents.disturb * torch.rand((len(z), 1, 1, 1), generator=source)
            z = z + most * torch.randn(z.shape, generator=source)
        device = next(iter(self.autoencoder.parameters()), z).device  # type: ignore[attr-defined]
        z = self.cache.standardisation.undo(z).to(device)
        decoded = torch.cat([self.autoencoder.decode(part) for part in z.split(_BATCH)])
        x = to_float(read_rows(self.images, start, stop)[0])
        return x, decoded.cpu().half().float()


def check_classes(counts: dict[int, int], classes: int) -> None:
    """Check that every sample has a class that `velocity.classes` allows.

    Args:
        counts: number of samples of each class; the class is negative where there is none.
        classes: velocity.classes, at least 1.

    Raises:
        UserError: classes are missing, or out of range.
    """
    if not counts or min(counts) < 0:
        raise UserError(
            f"velocity.classes = {classes} needs a class for every image, but the data set has no "
            "labels (nor has one that data.also joins); sort the images into one subfolder a "
            "class, or train with velocity.classes=0"
        )
    largest = max(counts)
    if largest >= classes:
        raise UserError(
            f"velocity.classes = {classes} allows the labels 0 to {classes - 1}, but the data set "
            f"has the label {largest}; set velocity.classes={largest + 1}"
        )


def source_of(config: Config) -> SampleSource:
    """Open the latent cache of a configuration as the source of its samples."""
    return (ResidualSource if config.velocity.image_channels else LatentSource)(config)
