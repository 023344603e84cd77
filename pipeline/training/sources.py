"""What a refiner learns: what a decoder leaves out of an image, given what it decodes.

The latents of an image x are drawn from their posterior, disturbed a little, as a flow's own are,
and decoded to c; the samples of a refiner are the residuals x − c, standardised, with c beside
each (`flows.networks.image_condition`). They come from the latent cache and the images that it
was made of.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from autoencoders.base import to_float
from pipeline.config.schema import Config, LatentsConfig
from pipeline.data.latent_cache import load_images_and_autoencoder, open_cache, read_rows
from pipeline.data.standardisation import Standardisation
from pipeline.errors import UserError
from pipeline.runtime.console import progress_bar
from pipeline.runtime.rng import generator
from pipeline.storage.shards import Shard, StoreReader, StoreWriter
from pipeline.training.matching_loss import IMAGE
from pipeline.training.stages import ensure_stage

#: images that the residuals' mean and deviation are measured on, at each of so many places
_MEASURED, _PLACES = 50, 20
_AT_ONCE = 250
#: of the draws of latents, the same in all runs
_SEED = 0


class Source(Protocol):
    """Where a training gets its samples from.

    Attributes:
        shape: of one sample, (C_z, H_z, W_z) or (D,).
        labels: class of each sample that the draws are of, int64 (n,), negative where it has
            none; None if no sample has one. Asked for only when velocity.classes is set.
    """

    shape: tuple[int, ...]

    @property
    def labels(self) -> torch.Tensor | None:
        """See the attributes."""

    def first_stage(self, run: Path, config: Config, accelerator: Accelerator) -> StoreReader:
        """Stage 0 of a run, made where it is not there yet."""

    def manifest(self) -> dict[str, Any]:
        """Entries of flow.json: standardisation and what the samples came from."""


class LatentSource:
    """The latent cache of a configuration.

    Args:
        config: sections data, autoencoder and latents.

    Raises:
        UserError: the cache is absent or damaged.
    """

    def __init__(self, config: Config) -> None:
        self.config, self.cache = config, open_cache(config)
        self.shape = self.cache.shape

    @cached_property
    def labels(self) -> torch.Tensor | None:
        """Of the images, mirror images included."""
        return self.cache.labels()

    def first_stage(self, run: Path, config: Config, accelerator: Accelerator) -> StoreReader:
        """Draws of the latents, `latents.draws` of each."""
        cache, latents = self.cache, config.latents
        identity = self.identity(latents)

        def make(writer: StoreWriter, index: int) -> torch.Tensor:
            drawn = generator(_SEED, "draw", index)
            rows = self.rows(*writer.bounds(index))
            return torch.cat([cache.sample(*each, latents.noise, drawn) for each in rows])

        known = self.labels if config.velocity.classes else None
        count, size = len(cache) * latents.draws, latents.shard_size
        if known is None:
            return ensure_stage(run, identity, count, size, make, accelerator)

        def labels(first: int, last: int) -> torch.Tensor:
            return known[torch.arange(first, last) % len(known)]

        return ensure_stage(run, identity, count, size, make, accelerator, labels=labels)

    def identity(self, latents: LatentsConfig) -> dict[str, Any]:
        """What decides the samples of stage 0."""
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
        """Rows of the cache that samples [first, last) are draws of, as (start, stop) in order.

        Args:
            first: sample; those from the size of the cache on are further draws.
            last: one past the last.
            most: rows together; None for as many as there are.
        """
        spans = []
        while first < last:
            row = first % len(self.cache)
            stop = min(row + min(most or last, last - first), len(self.cache))
            spans.append((row, stop))
            first += stop - row
        return spans

    def manifest(self) -> dict[str, Any]:
        """Standardisation, autoencoder and data."""
        images, autoencoder = load_images_and_autoencoder(self.config)
        wanted = self.config.autoencoder
        named = self.config.velocity.classes and images.class_names
        return {
            **({"class_names": list(named)} if named else {}),
            "standardisation": self.cache.standardisation.to_dict(),
            "latents": {
                "key": self.cache.key,
                "noise": self.config.latents.noise,
                "stochastic": self.cache.stochastic,
            },
            "autoencoder": {
                "name": self.config.autoencoder.name,
                "weights": self.config.autoencoder.weights,
                "fingerprint": autoencoder.fingerprint,
                "image_shape": list(images.shape),
                "adaptation": {"fit": wanted.fit, "size": wanted.size, "latents": wanted.latents},
            },
            "data": {
                "name": images.name,
                "split": images.split,
                "fingerprint": images.fingerprint,
            },
        }


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
        """Of the residuals, by channel, to three digits of the deviation.

        Measured on images from all over the cache; no more digits, which another processor might
        find otherwise.
        """
        drawn, parts = generator("residuals"), []
        for index in progress_bar(range(_PLACES), _PLACES, "measure residuals"):
            start = index * len(self.cache) // _PLACES
            stop = min(start + _MEASURED, (index + 1) * len(self.cache) // _PLACES)
            if start < stop:
                parts.append(self.pairs(start, stop, drawn))
        x, decoded = (torch.cat(part) for part in zip(*parts, strict=True))
        off = (x - decoded).double().transpose(0, 1).flatten(1)
        mean, std = off.mean(1), off.std(1).clamp(min=1e-3)
        unit = 10.0 ** (torch.floor(torch.log10(std)) - 2)
        return Standardisation(*((unit * (of / unit).round()).float() for of in (mean, std)))

    def first_stage(self, run: Path, config: Config, accelerator: Accelerator) -> StoreReader:
        """Residuals of `latents.draws` draws of each image's latents, in float16."""
        latents = config.latents
        residuals = self.standardisation.to_dict()
        identity = self.identity(latents) | {"disturb": latents.disturb, "residuals": residuals}
        self.autoencoder.to(accelerator.device)  # type: ignore[attr-defined]

        def make(writer: StoreWriter, index: int) -> Shard:
            drawn = generator(_SEED, "residuals", index)
            spans, parts = self.rows(*writer.bounds(index), _AT_ONCE), []
            for row, stop in progress_bar(spans, len(spans), f"decode shard {index}"):
                x, decoded = self.pairs(row, stop, drawn)
                z = self.standardisation.apply(x - decoded)
                parts.append((z.half(), decoded.half()))
            z, decoded = (torch.cat(part) for part in zip(*parts, strict=True))
            return {"z": z, IMAGE: decoded}

        count = len(self.cache) * latents.draws
        return ensure_stage(run, identity, count, latents.shard_size, make, accelerator)

    def manifest(self) -> dict[str, Any]:
        """As of the latents, with the residuals' own standardisation."""
        about = super().manifest()
        about["latents"]["disturb"] = self.config.latents.disturb
        return about | {"standardisation": self.standardisation.to_dict()}

    @torch.inference_mode()
    def pairs(self, start: int, stop: int, drawn: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images and what is decoded from their latents.

        Args:
            start: first row of the cache.
            stop: one past the last.
            drawn: source of what is random in the latents.

        Returns:
            Both (stop − start, C, H, W), in [-1, 1]; the second as float16 has it.
        """
        latents = self.config.latents
        z = self.cache.sample(start, stop, latents.noise, drawn)
        if latents.disturb:
            most = latents.disturb * torch.rand((len(z), 1, 1, 1), generator=drawn)
            z = z + most * torch.randn(z.shape, generator=drawn)
        device = next(iter(self.autoencoder.parameters()), z).device  # type: ignore[attr-defined]
        z = self.cache.standardisation.undo(z).to(device)
        decoded = torch.cat([self.autoencoder.decode(part) for part in z.split(_AT_ONCE)])
        x = to_float(read_rows(self.images, start, stop)[0])
        return x, decoded.cpu().half().float()


def check_labels(labels: Tensor | None, classes: int) -> None:
    """Check that every sample has a label that `velocity.classes` allows.

    Args:
        labels: int64 (n,); None or a negative number where there is none.
        classes: velocity.classes, at least 1.

    Raises:
        UserError: labels are missing, or out of range.
    """
    if labels is None or int(labels.min()) < 0:
        raise UserError(
            f"velocity.classes = {classes} needs a class for every image, but the data set has no "
            "labels (none that data.also joins has); sort the images into one subfolder a class, "
            "or train with velocity.classes=0"
        )
    largest = int(labels.max())
    if largest >= classes:
        raise UserError(
            f"velocity.classes = {classes} allows the labels 0 to {classes - 1}, but the data set "
            f"has the label {largest}; set velocity.classes={largest + 1}"
        )


def counts_of(labels: Tensor, classes: int) -> list[int]:
    """How many samples there are of each class."""
    return torch.bincount(labels, minlength=classes).tolist()
