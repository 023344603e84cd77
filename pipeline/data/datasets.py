"""Loaders of MNIST, CIFAR-10, ImageNet-32 and folders of images as an `ImageSet`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.assets.catalogue import ASSETS
from pipeline.assets.fetch import fetch_asset
from pipeline.config.data import LATENTS
from pipeline.data.image_set import ArrayPixels, ImageSet, apply_limit, fingerprint, join
from pipeline.data.imagenet32 import load_imagenet32
from pipeline.data.packed.load import FOLDERS, load_pictures
from pipeline.data.tensors import read_images
from pipeline.errors import UserError
from pipeline.runtime.console import say

if TYPE_CHECKING:
    from pipeline.config.data import DataConfig

SPLITS = ("train", "test")
_FOLDER_SPLITS = (*SPLITS, "val")


def load_images(data: DataConfig) -> ImageSet:
    """Open a data set; MNIST and CIFAR-10 are fetched if they are not stored.

    Pixels are read on access. Size and mode apply to folders, tables and tar shards.

    Raises:
        UserError: a name or split is unknown, a path, size, mode or limit is invalid, or joined
            sets have different shapes.
        JkoflowError: the data set could not be fetched.
    """
    parts = [_load_one(data)]
    for joined in data.also:
        name, _, split = joined.partition("/")
        part = dataclasses.replace(data, name=name, split=split or data.split, also=[])
        parts.append(_load_one(part))
    return join(parts)


def _load_one(data: DataConfig) -> ImageSet:
    """Open one data set without those of `data.also`."""
    if data.name not in DATASETS:
        raise UserError(f"data set {data.name!r} is unknown; choose one of {', '.join(DATASETS)}")
    split = "test" if data.name == "imagenet32" and data.split == "val" else data.split
    splits = _FOLDER_SPLITS if data.name in FOLDERS else SPLITS
    if split not in splits:
        choices = ", ".join(splits)
        raise UserError(f"{data.name} has no split {data.split!r}; choose one of {choices}")
    if data.limit is not None and data.limit < 1:
        raise UserError(f"data.limit is {data.limit}; expected 1 or more, or null for all images")
    return DATASETS[data.name](data, split)


def _mnist(data: DataConfig, split: str) -> ImageSet:
    """Open the 60 000 or 10 000 digits (1, 28, 28), mapped from the idx files."""
    folder = fetch_asset("mnist", log=say)
    stem = "train" if split == "train" else "t10k"
    # Idx format: a header of 16 bytes before the images and of 8 before the labels.
    labels = np.fromfile(folder / f"{stem}-labels-idx1-ubyte", np.uint8, offset=8)
    shape = (len(labels), 1, 28, 28)
    path = folder / f"{stem}-images-idx3-ubyte"
    images = np.memmap(path, np.uint8, mode="r", offset=16, shape=shape)
    return _of_asset("mnist", split, data.limit, images, labels)


def _cifar10(data: DataConfig, split: str) -> ImageSet:
    """Open the 50 000 or 10 000 images (3, 32, 32) of ten classes."""
    folder = fetch_asset("cifar10", log=say)
    images = np.load(folder / f"{split}_images.npy", mmap_mode="r")
    return _of_asset("cifar10", split, data.limit, images, np.load(folder / f"{split}_labels.npy"))


def _of_asset(
    name: str, split: str, limit: int | None, images: np.ndarray, labels: np.ndarray
) -> ImageSet:
    """Return the images of an asset, arrays (N, C, H, W) and (N,) uint8, as an image set."""
    count, extra = apply_limit(len(images), limit)
    content = {"name": name, "split": split, "content": ASSETS[name].sha256}
    _, channels, height, width = images.shape
    return ImageSet(
        name=name,
        split=split,
        shape=(channels, height, width),
        fingerprint=fingerprint({**content, **extra}),
        count=count,
        pixels=ArrayPixels(images, labels),
    )


def _require_folder(data: DataConfig, what: str) -> Path:
    """Return `data.path` if it is a folder; `what` describes its content in errors."""
    if not data.path:
        raise UserError(f"data.path is null; set it to the folder of {what}")
    path = Path(data.path).expanduser()
    if not path.is_dir():
        raise UserError(f"data.path is {path}, not a folder; set it to the folder of {what}")
    return path


def _imagenet32(data: DataConfig, split: str) -> ImageSet:
    """Open ImageNet-32."""
    path = _require_folder(data, "ImageNet-32's official files (train_data_batch_1.npz, …)")
    return load_imagenet32(path, split, data.limit)


def _npz(data: DataConfig, split: str) -> ImageSet:
    """Open an .npz of images, which is the train split."""
    path = Path(str(data.path)).expanduser()
    if not data.path or not path.is_file():
        raise UserError(f"data.path is {data.path}; set it to an .npz of images, `arr_0`")
    if split != "train":
        raise UserError(f"{path} has no split {split!r}; expected train; name another .npz for it")
    return read_images(path, split, data.limit)


def _latents(data: DataConfig, split: str) -> ImageSet:
    """Refuse to open images: the data are latents."""
    raise UserError(
        f"data.name is latents ({data.path}), of which there are no images; expected a data set "
        "of images; give a folder of images or leave this measurement out"
    )


DATASETS: dict[str, Callable[[DataConfig, str], ImageSet]] = {
    "mnist": _mnist,
    "cifar10": _cifar10,
    "imagenet32": _imagenet32,
    **dict.fromkeys(FOLDERS, load_pictures),
    "npz": _npz,
    LATENTS: _latents,
}
