"""Source of training samples from a two-dimensional point set."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from pipeline.config.schema import Config
from pipeline.data.standardisation import Standardisation
from pipeline.errors import UserError
from pipeline.runs.manifest import DataRecord, Manifest
from pipeline.runtime.rng import generator
from pipeline.storage.shards.reader import StoreReader
from pipeline.storage.shards.writer import StoreWriter
from pipeline.toy2d.point_sets import PointSet, point_set
from pipeline.training.stages import ensure_stage


class PointSource:
    """Sample source of a two-dimensional point set, seeded by train.seed.

    Raises:
        UserError: the configuration has no points, or the point set is unknown or unreadable.
    """

    shape: tuple[int, ...] = (2,)
    class_counts: dict[int, int] = {}  # noqa: RUF012 - no class

    def __init__(self, config: Config) -> None:
        if config.points is None:
            raise UserError(
                f"data.name is {config.data.name}; expected a point set; for images, use `jkoflow "
                "encode` and `jkoflow train`"
            )
        self.settings, self.seed = config.points, config.train.seed
        self.points: PointSet = point_set(config.data.name, config.data.path)
        points = self.sample("fingerprint", 0, 64)
        self.fingerprint = hashlib.sha256(points.numpy().tobytes()).hexdigest()

    def sample(self, use: str, index: int, n: int) -> Tensor:
        """Sample n points, float32 (n, 2), for a use (train, test, …) and an index."""
        parts = (self.seed, "points", self.points.name, use, index)
        return self.points.sample(n, generator(*parts))

    def first_stage(self, run: Path, config: Config, accelerator: Accelerator) -> StoreReader:
        """Write or open stage 0, the training points."""
        identity = {
            "kind": "stage",
            "stage": 0,
            "points": self.points.name,
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "shape": list(self.shape),
        }

        def make(writer: StoreWriter, index: int) -> Tensor:
            first, last = writer.bounds(index)
            return self.sample("train", index, last - first)

        size = config.latents.shard_size
        return ensure_stage(run, identity, self.settings.train, size, make, accelerator)

    def manifest(self, name: str) -> Manifest:
        """Return the manifest of a run on the points, which are not standardised."""
        return Manifest(
            name,
            self.shape,
            Standardisation(torch.zeros(2), torch.ones(2)),
            DataRecord(
                self.points.name,
                "train",
                self.fingerprint,
                count=self.settings.train,
                seed=self.seed,
            ),
        )
