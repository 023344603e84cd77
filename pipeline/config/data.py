"""Schema of the images, the autoencoder and the latents of a flow, or of its points."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from pipeline.config.keys import constant, setting

Fit = Literal["exact", "native", "resize"]

#: the data set whose `data.path` is a cache of a caller's own latents
LATENTS = "latents"
#: data sets of images, and of latents; plug-ins add theirs
IMAGE_SETS = ["mnist", "cifar10", "imagenet32", "folder", "hf", "webdataset", "npz", LATENTS]
#: tables of numbers (`jkoflow bench tabular`); every other data.name is a set of points in the
#: plane (`jkoflow toy2d`)
TABLES = ("power", "gas", "miniboone", "bsds300")


@dataclass(frozen=True)
class DataConfig:
    """Images, or points in the plane.

    Attributes:
        name: mnist, cifar10, imagenet32, folder, npz, hf or webdataset; latents, a caller's own
            (docs/python.md); or a table or a set of points (`jkoflow bench`, `toy2d`).
        split: the split that the flow or the autoencoder trains on.
        test_split: the split that measures reconstruction and likelihood.
        path: the folder of the images, or of the official files (imagenet32); the file of npz;
            the cache of latents. hf has a parquet or arrow file, a folder of them or a hub id.
            webdataset has a tar file or a folder of them. A table has its file or folder, and
            data.name=picture its image. folder, hf, webdataset and latents take s3://…, too.
        columns: hf: the column of the images, and that of the classes; empty takes usual names.
        size: folder, hf, webdataset: side of the square that images are resized and
            centre-cropped to.
        mode: folder, hf, webdataset: RGB or L (grey).
        limit: number of images that are used of each data set, from the first on; null uses all.
        also: more data sets, which are appended without their classes: mnist, or cifar10/train for
            another split than data.split.
    """

    name: str = "mnist"
    split: str = "train"
    test_split: str = setting("test", resume="free")
    path: str | None = setting(None, resume="moved")
    columns: list[str] = field(default_factory=list)
    size: int | None = setting(None, least=1, most=2**13)
    mode: Literal["RGB", "L"] = "RGB"
    limit: int | None = setting(None, least=1)
    also: list[str] = field(default_factory=list)

    def of_split(self, split: str) -> DataConfig:
        """Return a split of the first data set alone, which measurements use."""
        return dataclasses.replace(self, split=split, also=[])


@dataclass(frozen=True)
class EncoderConfig:
    """The autoencoder whose latents the flow models.

    Attributes:
        name: pretrained (shipped, trained here or converted), identity (pixel space), diffusers
            (a local folder or a hub id; needs the optional extra), or that of a plug-in.
        weights: a shipped name (such as mnist-kl), the path of a .safetensors file, or an argument
            of diffusers.
        fit: treatment of images whose shape is not the encoder's. exact refuses them, and native
            accepts any size with the same channels. resize scales them and undoes it after
            decoding.
        size: resize: side of the square that the encoder receives; 0 takes its own.
        latents: VQ: pre flows on latents before quantisation, which decoding quantises; quantised
            flows on codebook entries.
    """

    name: str = "pretrained"
    weights: str | None = "mnist-kl"
    fit: Fit = "exact"
    size: int = setting(0, least=0, most=2**13)
    latents: Literal["pre", "quantised"] = "pre"


@dataclass(frozen=True)
class LatentsConfig:
    """The latent cache.

    Attributes:
        shard_size: samples per file of the cache and of the stages.
        batch_size: images per call of the encoder.
        mirror: encode the mirror image of every image as well.
        noise: standard deviation of Gaussian noise that is added to the latents of a deterministic
            encoder, in units of the standardised latents; likelihoods include it.
        draws: posterior samples (or noisy copies) of every latent that the flow trains on.
        disturb: refiner: largest standard deviation of noise on the standardised latents before
            they are decoded. Every image draws its own, uniformly from 0 up, because the latents
            of a flow deviate, too.
    """

    shard_size: int = setting(10000, least=1)
    batch_size: int = setting(250, least=1, most=2**24)
    mirror: bool = False
    noise: float = setting(0.0, least=0)
    draws: int = setting(1, least=1, most=10**6)
    disturb: float = setting(0.0, least=0)


@dataclass(frozen=True)
class PointsConfig:
    """Points of a two-dimensional experiment (`jkoflow toy2d`).

    Attributes:
        train: points that the flow trains on.
        test: fresh points that measure likelihood and inversion error.
        compare: generated and fresh points of the maximum mean discrepancy.
        grid: the density is evaluated on grid × grid points.
    """

    train: int = setting(50000, least=2, most=10**8, resume="fixed")
    test: int = constant(5000)
    compare: int = constant(2000)
    grid: int = constant(100)
