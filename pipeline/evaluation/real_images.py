"""Real images that an evaluation uses: which split, and which images of it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from pipeline.config.data import DataConfig
from pipeline.data.datasets import load_images
from pipeline.data.image_set import ImageSet
from pipeline.data.packed.load import FOLDERS, has_splits
from pipeline.errors import UserError
from pipeline.runtime.rng import generator

#: names the random order, in its seed and in the keys of stores
ORDER = "order of evaluation"


def held_out_images(data: DataConfig) -> ImageSet:
    """Load the test split, or the training split of an .npz or a folder that is not split."""
    if data.name == "npz" or (data.name in FOLDERS and data.path and not has_splits(data)):
        return load_images(data.of_split(data.split))
    return load_images(data.of_split(data.test_split))


def at_least(data: DataConfig, n: int) -> ImageSet:
    """Load the test split, or the training split where the test split has fewer than n images."""
    held_out = held_out_images(data)
    return held_out if len(held_out) >= n else load_images(data.of_split(data.split))


def subset_indices(images: ImageSet, n: int) -> npt.NDArray[np.int64]:
    """Return n indices of a set: the start of one fixed random order of the whole set.

    The first n images of a split may not represent it: MNIST's test digits come from two groups of
    writers, one after the other. A whole set keeps its own order.

    Raises:
        UserError: the set has fewer than n images.
    """
    require_images(images, n)
    if n == len(images):
        return np.arange(n)
    return torch.randperm(len(images), generator=generator(0, ORDER))[:n].numpy()


def require_images(images: ImageSet, n: int, advice: str = "ask for fewer") -> None:
    """Raise UserError for an n that is larger than a set."""
    if n > len(images):
        raise UserError(
            f"{n} images were asked for, but {images.name} ({images.split}) has {len(images)}; "
            f"{advice}"
        )


def require_fid_sample(n: int) -> None:
    """Raise UserError for an n below 2, from which no covariance can be estimated."""
    if n < 2:
        raise UserError(f"FID needs at least 2 images, not {n}; use 2000 or more")
