"""Images in a benchmark: their latents are the data, and samples are measured as images.

The samples of a problem are the standardised latents of the training split, flattened to vectors.
The likelihood is that of latents of the test split. FID and KID are those of decoded samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from torch import Tensor

from autoencoders.base import Autoencoder, to_uint8
from eval.distances import frechet_distance, kid
from eval.frechet_error import frechet_error
from eval.gaussian import GaussianStats
from pipeline.config.data import IMAGE_SETS, LATENTS
from pipeline.config.plain import with_values
from pipeline.config.schema import Config
from pipeline.data.encoding import encode, standardised_latents
from pipeline.data.image_set import ImageSet
from pipeline.data.latent_cache import LatentCache, build_encoder
from pipeline.errors import UserError
from pipeline.evaluation.features import FeatureExtractor
from pipeline.evaluation.kid_precision_recall import LEAST, MOST
from pipeline.evaluation.real_images import (
    at_least,
    held_out_images,
    require_fid_sample,
    require_images,
    subset_indices,
)
from pipeline.runtime.console import Progress
from pipeline.runtime.rng import generator

#: sampled images, and held-out images of the NLL, that measure a model in training
FEW = 250
#: images of the search of learning rates
_SEARCH = 500
#: sampled latents that are decoded together
_CHUNK = 250


@dataclass(frozen=True)
class ImageMetrics:
    """Metrics of sampled images.

    Attributes:
        fid: FID against a reference.
        fid_error: its standard error over the sampled images; None in training.
        n: sampled images.
        reference: name of the reference.
        few: first images that `few_fid` is of, as in training.
        few_fid: FID of these.
        kid: KID against images of the held-out split; None in training.
        kid_error: its standard error; likewise.
        kid_n: images of either kind; likewise.
        floor: FID of reconstructions of as many real images; None in training, or without
            evaluate.floor.
        split: of these real images; likewise.
    """

    fid: float
    fid_error: float | None
    n: int
    reference: str
    few: int
    few_fid: float
    kid: float | None = None
    kid_error: float | None = None
    kid_n: int | None = None
    floor: float | None = None
    split: str | None = None


class Pictures:
    """Measures of sampled latents as images.

    Args:
        config: sections data, latents and evaluate.
        cache: of the training latents.
        autoencoder: of the latents.
        extractor: of features, with its device.

    Raises:
        UserError: evaluate.n is too small or too large, or the reference does not exist.
    """

    def __init__(
        self,
        config: Config,
        cache: LatentCache,
        autoencoder: Autoencoder,
        extractor: FeatureExtractor,
    ) -> None:
        self.config, self.cache, self.autoencoder = config, cache, autoencoder
        self.extractor, self.n = extractor, config.evaluate.n
        self.few = min(FEW, self.n)
        self.held_out = held_out_images(config.data)
        require_fid_sample(self.n)
        if config.evaluate.floor:
            advice = "set evaluate.n to fewer, or evaluate.floor=false"
            require_images(at_least(config.data, self.n), self.n, advice)
        try:
            self.reference = extractor.reference(config.evaluate.reference)
        except (ValueError, FileNotFoundError) as error:
            raise UserError(f"evaluate.reference: {error}") from error

    @property
    def device(self) -> torch.device:
        """The device of the autoencoder and the features."""
        return self.extractor.accelerator.device

    @cached_property
    def floor(self) -> tuple[float, str] | None:
        """FID of reconstructions of n real images, and their split; None if it is not wanted."""
        if not self.config.evaluate.floor:
            return None
        images = at_least(self.config.data, self.n)
        value = self.extractor.reconstruction_fid(
            self.autoencoder,
            images,
            self.n,
            self.reference,
            self.config.latents.noise,
            self.cache.standardisation,
        )
        return value, images.split

    def real(self, n: int) -> Tensor:
        """Read n held-out images, uint8 (n, C, H, W), or all if there are fewer."""
        chosen = subset_indices(self.held_out, min(n, len(self.held_out)))
        return torch.from_numpy(self.held_out.take(chosen))

    @torch.inference_mode()
    def decode(self, z: Tensor) -> Tensor:
        """Decode standardised latents (n, D) to images uint8 (n, C, H, W), on the CPU."""
        self.autoencoder.to(self.device)  # type: ignore[attr-defined]
        grids = z.unflatten(1, self.cache.shape)
        parts = [
            to_uint8(self.autoencoder.decode(self.cache.standardisation.undo(part))).cpu()
            for part in grids.to(self.device).split(_CHUNK)
        ]
        return torch.cat(parts).clone()

    def metrics(self, images: Tensor, quick: bool) -> ImageMetrics | None:
        """Measure sampled images uint8 (n, C, H, W).

        Args:
            images: at least 2; fewer have no metrics.
            quick: whether FID alone will do.
        """
        if len(images) < 2:
            return None
        features = self.extractor.features_of(images, "samples")
        stats, few = _statistics(features), min(self.few, len(features))
        fid = frechet_distance(stats, self.reference)
        name = self.config.evaluate.reference
        if quick:
            return ImageMetrics(fid, None, len(features), name, few, fid)
        few_fid = frechet_distance(_statistics(features[:few]), self.reference)
        error = frechet_error(features, None, stats, self.reference)
        floor = self.floor or (None, None)
        distance = self._kid(features)
        return ImageMetrics(fid, error, len(features), name, few, few_fid, *distance, *floor)

    def _kid(self, features: Tensor) -> tuple[float | None, float | None, int | None]:
        """Compute KID against equally many held-out images, its error and the number."""
        count = min(len(features), len(self.held_out), MOST)
        if count < LEAST:
            return None, None, None
        store = self.extractor.real_features(self.held_out, min(self.n, len(self.held_out), MOST))
        result = kid(features[:count], store.read("features", 0, count))
        return result.value, result.standard_error, count


def _statistics(features: Tensor) -> GaussianStats:
    stats = GaussianStats(features.shape[1])
    stats.update(features)
    return stats


def image_config(config: Config) -> Config:
    """Return the configuration of a flow without what the models of a benchmark do not share.

    Classes, guidance and refiner are off, networks train in float32, and there are no previews.

    Raises:
        UserError: the configuration is of a refiner, or not of images.
    """
    if config.velocity.image_channels:
        raise UserError(
            f"the configuration of {config.name} is of a refiner; expected a flow on latents; "
            "choose another --data"
        )
    if config.data.name not in IMAGE_SETS or config.data.name == LATENTS:
        raise UserError(
            f"data.name is {config.data.name}; expected images, whose samples can be decoded; "
            "remove it"
        )
    values = {"velocity.classes": 0, "train.precision": "fp32", "train.preview_every": 0}
    off = ("generate.labels", "generate.guidance", "generate.guide", "generate.refiner")
    return with_values(config, values | dict.fromkeys(off))


def open_latents(
    config: Config, accelerator: Accelerator, progress: Progress
) -> tuple[LatentCache, Autoencoder]:
    """Open the latents of the training split, which are encoded if they are missing.

    Raises:
        UserError: the data or the autoencoder are missing, or do not fit.
    """
    cache = encode(config, accelerator, progress)
    images = held_out_images(config.data)
    return cache, build_encoder(config.autoencoder, images.shape)


def held_out_latents(
    config: Config,
    latents: tuple[LatentCache, Autoencoder],
    test: int,
    split: str,
    device: torch.device,
) -> tuple[Tensor, str]:
    """Encode held-out images to vectors.

    Args:
        config: sections data and latents.
        latents: the cache of the training split, for its standardisation, and the autoencoder.
        test: images that the table uses; all if there are fewer.
        split: test, or validation for up to 500 images that the likelihoods of the table do not
            use.
        device: of the encoder.

    Returns:
        the vectors (n, D), and what they are.

    Raises:
        UserError: no images are left for the validation.
    """
    cache, autoencoder = latents
    images = held_out_images(config.data)
    indices = subset_indices(images, min(test, len(images)))
    if split == "validation":
        indices = _others(images, indices)
    rng = generator(0, "nll")
    z = standardised_latents(
        autoencoder,
        cache.standardisation,
        config.latents.noise,
        images,
        indices,
        device,
        rng,
    )
    note = (
        f"{len(cache):,} latents {'x'.join(map(str, cache.shape))} of {images.name}; NLL of "
        f"{len(indices):,} images of its {images.split} split"
    )
    return z.flatten(1), note


def _others(images: ImageSet, used: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Choose images of a set that are not used, evenly over its order.

    Raises:
        UserError: fewer than two are left.
    """
    left = np.setdiff1d(np.arange(len(images)), used)
    if len(left) < 2:
        raise UserError(
            f"--test is {len(used)} of {len(images)} held-out images; expected at least 2 fewer, "
            "which --tune compares learning rates on; lower --test"
        )
    return left[np.linspace(0, len(left) - 1, min(_SEARCH, len(left))).astype(np.int64)]
