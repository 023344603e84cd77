"""What a refiner learns: what a decoder leaves out of an image, given what it decodes.

The latents of an image x are drawn from their posterior, disturbed a little, as a flow's own are,
and decoded to c; the samples of a refiner are the residuals x − c, standardised, with c beside
each (`flows.beside`). They come from the latent cache and the images that it was made of.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from autoencoders.base import to_float
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.latents import Standardisation, image_rows, load_parts
from pipeline.matching import BESIDE
from pipeline.seeds import generator
from pipeline.stages import LatentSource, ensure_stage
from pipeline.store import Shard, StoreReader, StoreWriter
from pipeline.terminal import bar

#: images that the residuals' mean and deviation are measured on, at each of so many places
_MEASURED, _PLACES = 50, 20
_AT_ONCE = 250


class ResidualSource(LatentSource):
    """Residuals (C, H, W) of the images of a latent cache, each with what is decoded beside it.

    Args:
        config: sections data, autoencoder, latents and velocity.

    Raises:
        UserError: the cache is absent or damaged, or `velocity.beside` is not the channels of the
            images.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.images, self.autoencoder = load_parts(config)
        self.shape = self.images.shape
        if config.velocity.beside != self.shape[0]:
            raise UserError(
                f"velocity.beside is {config.velocity.beside}, but {self.images.name} has images "
                f"of {self.shape[0]} channels; a refiner is told the decoded image, so set it to "
                "that"
            )

    @cached_property
    def standardisation(self) -> Standardisation:
        """Of the residuals, by channel, to three digits of the deviation.

        Measured on images from all over the cache; no more digits, which another processor might
        find otherwise.
        """
        drawn, parts = generator("residuals"), []
        for index in bar(range(_PLACES), _PLACES, "measure residuals"):
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
            drawn = generator(latents.seed, "residuals", index)
            spans, parts = self.rows(*writer.bounds(index), _AT_ONCE), []
            for row, stop in bar(spans, len(spans), f"decode shard {index}"):
                x, decoded = self.pairs(row, stop, drawn)
                z = self.standardisation.apply(x - decoded)
                parts.append((z.half(), decoded.half()))
            z, decoded = (torch.cat(part) for part in zip(*parts, strict=True))
            return {"z": z, BESIDE: decoded}

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
        z = self.cache.draw(start, stop, latents.noise, drawn)
        if latents.disturb:
            most = latents.disturb * torch.rand((len(z), 1, 1, 1), generator=drawn)
            z = z + most * torch.randn(z.shape, generator=drawn)
        device = next(iter(self.autoencoder.parameters()), z).device  # type: ignore[attr-defined]
        z = self.cache.standardisation.undo(z).to(device)
        decoded = torch.cat([self.autoencoder.decode(part) for part in z.split(_AT_ONCE)])
        x = to_float(image_rows(self.images, start, stop)[0])
        return x, decoded.cpu().half().float()
