"""Problems of a benchmark: a data set with its training samples and its held-out samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from pipeline.bench.images import (
    Pictures,
    held_out_latents,
    image_config,
    open_latents,
)
from pipeline.config import packaged
from pipeline.config.data import IMAGE_SETS, TABLES
from pipeline.config.load import load_config
from pipeline.config.plain import with_values
from pipeline.config.schema import Config
from pipeline.data.standardisation import Standardisation
from pipeline.errors import UserError
from pipeline.evaluation.features import FeatureExtractor
from pipeline.runs.manifest import DataRecord, Manifest
from pipeline.runtime.console import Progress, progress_bar
from pipeline.runtime.rng import Batches
from pipeline.runtime.system import require_disk_space
from pipeline.storage.shards.reader import StoreReader
from pipeline.storage.shards.writer import StoreWriter
from pipeline.tabular.load import load_table
from pipeline.tabular.table import Table
from pipeline.tabular.whitening import Whitening, whiten
from pipeline.toy2d.point_sets import POINTS
from pipeline.toy2d.point_source import PointSource
from pipeline.training.sources import LatentSource, SampleSource
from pipeline.training.stages import ensure_stage

#: suites: their folders of configurations, the data sets of a bench that names none, and all
SUITES = {"toy2d": packaged.TOY2D, "tabular": packaged.TABULAR, "images": packaged.FLOWS}
DEFAULTS = {
    "toy2d": ("checkerboard", "8gaussians", "rose", "tree"),
    "tabular": TABLES,
    "images": ("mnist", "cifar10"),
}
CHOICES = {
    "toy2d": (*POINTS, "picture"),
    "tabular": TABLES,
    "images": tuple(packaged.available()),
}
#: settings of a configuration that an option of a benchmark sets
_OPTIONS = {
    "train.seed": "--seeds", "train.max_minutes": "--budget", "velocity.width": "--parameters",
    "data.name": "--data",
}  # fmt: skip
#: held-out images that measure a likelihood, unless the caller chooses
IMAGES_TEST = 1000
_FLOAT = 4


@dataclass(frozen=True)
class HeldOut:
    """Sizes of the held-out samples; a data set that has fewer gives those it has.

    Attributes:
        test: samples that measure the likelihood.
        compare: samples that the MMD compares with as many generated ones; images have none.
        whitened: whether models see the rows of a table whitened; the metrics are those of the
            rows.
    """

    test: int = 5000
    compare: int = 2000
    whitened: bool = False


@dataclass(frozen=True)
class Problem:
    """Data set of a benchmark under one seed.

    Attributes:
        name: of the data set.
        config: configuration of JKO-iFlow on it.
        source: training samples.
        test: held-out samples (n, D) of the likelihood.
        compare: held-out samples (m, D) of the MMD; m = 0 for images.
        log_scale: nats that the NLL in the data's units has beyond that of the samples.
        note: origin and split of the data.
        pictures: measures samples as images; None for vectors, and for a search.
        unit: dimensions whose nats are one unit of the NLL: D for images, else 1.
        whitening: of the training and test samples, which `compare` is without; None for none.
    """

    name: str
    config: Config
    source: SampleSource
    test: Tensor
    compare: Tensor
    log_scale: float
    note: str
    pictures: Pictures | None = None
    unit: int = 1
    whitening: Whitening | None = None

    @property
    def learning_rate(self) -> float:
        """Return the peak learning rate, of the first block if each has its own."""
        rate = self.config.train.lr
        return rate if isinstance(rate, float) else rate[0]

    @property
    def dim(self) -> int:
        """Return D."""
        return math.prod(self.source.shape)

    def restored(self, samples: Tensor) -> Tensor:
        """Return samples of a model (n, D) in the coordinates of `compare`."""
        return samples if self.whitening is None else self.whitening.undo(samples)

    @property
    def samples(self) -> int:
        """Return the number of samples that are generated."""
        return len(self.compare) if self.pictures is None else self.pictures.n


def problem_config(suite: str, name: str, overrides: Sequence[str], seed: int) -> Config:
    """Return the packaged configuration of a data set, with overrides and a seed.

    Raises:
        UserError: the suite, the data set or a setting is unknown, or an option sets it.
    """
    for key, option in _OPTIONS.items():
        if suite == "images" and key == "data.name":
            continue  # the latents of other images are data, too
        if any(each.partition("=")[0].strip() == key for each in overrides):
            raise UserError(f"{key} is set by {option} in a benchmark; remove it from --set")
    if suite not in SUITES:
        raise UserError(f"suite {suite!r} is unknown; choose one of {', '.join(SUITES)}")
    if name not in CHOICES[suite]:
        known = ", ".join(CHOICES[suite])
        raise UserError(f"data set {name!r} is not in {suite}; choose one of {known}")
    base, more = name, list(overrides)
    if name == "picture":
        base, more = "rose", ["data.name=picture", "name=picture", *more]
    config = load_config(base, more, SUITES[suite])
    if suite == "images":
        config = with_values(image_config(config), {"name": name})
    return with_values(config, {"train.seed": seed})


def open_problem(
    config: Config,
    held_out: HeldOut | None = None,
    split: str = "test",
    accelerator: Accelerator | None = None,
    progress: Progress = progress_bar,
) -> Problem:
    """Open the data of a configuration.

    Args:
        config: of a set of points, a table or images.
        held_out: sizes of the held-out samples.
        split: of a table or images that they come from: test or validation.
        accelerator: device of the autoencoder and the features of images; None makes one.
        progress: wraps loops over images.

    Raises:
        UserError: the data are missing, damaged or too few.
        JkoflowError: a package could not be fetched.
    """
    sizes = held_out or HeldOut()
    if config.data.name in IMAGE_SETS:
        return _open_images(config, sizes.test, split, accelerator or Accelerator(), progress)
    if config.data.name not in TABLES:
        points = PointSource(config)
        test = points.sample("test", 0, sizes.test)
        compare = points.sample("compare", 0, sizes.compare)
        note = f"{points.settings.train:,} training points, generated"
        return Problem(config.data.name, config, points, test, compare, 0.0, note)
    table, whitening = load_table(config.data), None
    rows = table.rows[split]
    compare = rows.read(max(0, len(rows) - sizes.compare), len(rows))
    note = f"{table.source}; {table.split}"
    if sizes.whitened:
        table, whitening = whiten(table, config.data.limit)
        note += "; models see whitened rows"
    test = table.rows[split].read(0, min(sizes.test, len(rows)))
    source = TableSource(config, table)
    log_scale = table.log_scale
    return Problem(
        table.name, config, source, test, compare, log_scale, note, whitening=whitening
    )


def _open_images(
    config: Config, test: int, split: str, accelerator: Accelerator, progress: Progress
) -> Problem:
    latents = open_latents(config, accelerator, progress)
    z, note = held_out_latents(config, latents, test, split, accelerator.device)
    pictures = None
    if split == "test":
        pictures = Pictures(config, *latents, FeatureExtractor(accelerator, progress))
    source, dim = LatentSource(config), z.shape[1]
    return Problem(config.name, config, source, z, z[:0], 0.0, note, pictures, unit=dim)


class TableSource:
    """Sample source of the training rows of a table, the first `data.limit` of them.

    Args:
        config: sections data and latents.
        table: the table.
    """

    class_counts: dict[int, int] = {}  # noqa: RUF012 - no class

    def __init__(self, config: Config, table: Table) -> None:
        self.table = table
        rows = table.rows["train"]
        self.count = min(config.data.limit or len(rows), len(rows))
        self.shape: tuple[int, ...] = (table.dim,)

    def first_stage(self, run: Path, config: Config, accelerator: Accelerator) -> StoreReader:
        """Write or open stage 0, the training rows.

        Raises:
            UserError: the disk has no room for them.
        """
        identity: dict[str, Any] = {
            "kind": "stage",
            "stage": 0,
            "table": self.table.name,
            "fingerprint": self.table.fingerprint,
            "shape": list(self.shape),
        }

        def make(writer: StoreWriter, index: int) -> Tensor:
            return self.table.rows["train"].read(*writer.bounds(index))

        require_disk_space(run, _FLOAT * self.count * self.table.dim, "the training rows")
        size = config.latents.shard_size
        return ensure_stage(run, identity, self.count, size, make, accelerator)

    def manifest(self, name: str) -> Manifest:
        """Return the manifest of a run on the rows, which are standardised already."""
        table, dim = self.table, self.table.dim
        record = DataRecord(table.name, "train", table.fingerprint, count=self.count)
        return Manifest(
            name, self.shape, Standardisation(torch.zeros(dim), torch.ones(dim)), record
        )


def batch_of(stage: StoreReader, rows: Tensor, random: torch.Generator) -> Tensor:
    """Return the samples of some rows of a stage as vectors (B, D).

    Latents with a posterior are drawn from it in every batch, as a first JKO block draws them.
    """
    if not stage.manifest["identity"].get("moments"):
        return stage.take("z", rows).flatten(1)
    mean, std = stage.take("mean", rows), stage.take("std", rows)
    return (mean + std * torch.randn(mean.shape, generator=random)).flatten(1)


def batches_of(stage: StoreReader, config: Config) -> Batches:
    """Return the batches of a training on a stage, seeded as those of a block's training."""
    return Batches(len(stage), config.train.batch_size, config.train.seed, "block", 0)
