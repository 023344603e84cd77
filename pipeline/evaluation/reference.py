"""Reference statistics of a split: mean and covariance of its features, with a card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from eval.distances import frechet_distance
from eval.features.inception import EXTRACTOR
from eval.gaussian import GaussianStats
from eval.references import reference_bytes
from pipeline.config.schema import Config
from pipeline.data.datasets import load_images
from pipeline.data.image_set import ImageSet
from pipeline.errors import UserError
from pipeline.evaluation.features import FeatureExtractor, statistics_of
from pipeline.evaluation.real_images import require_fid_sample, require_images, subset_indices
from pipeline.runtime.console import Progress
from pipeline.storage import atomic
from pipeline.storage.shards.reader import StoreReader


def make_reference(
    config: Config, out: Path, test: list[int], accelerator: Accelerator, progress: Progress
) -> None:
    """Write the statistics of `data.split`; their card has the FID of real test images.

    The card has the FID of n images of the test split for each n of `test`.

    Raises:
        UserError: the file is no .safetensors, an n is below 2, or the test split has fewer
            images.
    """
    if out.suffix != ".safetensors":
        raise UserError(f"the reference is called {out.name}; expected a .safetensors file")
    extractor = FeatureExtractor(accelerator, progress)
    images = load_images(config.data)
    held_out = load_images(config.data.of_split(config.data.test_split)) if test else images
    for n in test:
        require_fid_sample(n)
        require_images(held_out, n)
    stats = statistics_of(extractor.real_features(images, len(images)))
    card = card_of(images)
    if test:
        features = extractor.real_features(held_out, max(test))
        card["test_split_fid"] = {
            str(n): frechet_distance(_chosen_stats(features, held_out, n), stats)
            for n in sorted(test)
        }
    if accelerator.is_main_process:
        atomic.write_bytes(out, reference_bytes(stats, card))


def card_of(images: ImageSet) -> dict[str, Any]:
    """Return the card of a reference: its data, and the network of its features."""
    return {
        "dataset": images.name,
        "split": images.split,
        "n": len(images),
        "extractor": EXTRACTOR,
        "content_sha256": images.fingerprint,
    }


def _chosen_stats(features: StoreReader, images: ImageSet, n: int) -> GaussianStats:
    """Compute the statistics of n images of `subset_indices` from the features of more."""
    position = np.empty(len(images), dtype=np.int64)
    position[subset_indices(images, len(features))] = np.arange(len(features))
    stats = GaussianStats()
    stats.update(features.take("features", torch.from_numpy(position[subset_indices(images, n)])))
    return stats
