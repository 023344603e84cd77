"""A sample source of two labelled clusters in the plane."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from pipeline.config.schema import Config
from pipeline.runs.manifest import Manifest
from pipeline.runtime.rng import generator
from pipeline.storage.shards.reader import StoreReader
from pipeline.storage.shards.writer import StoreWriter
from pipeline.training.stages import ensure_stage
from tests.pipeline.records import synthetic_manifest

#: centres of the clusters; the second holds three quarters of the samples
CENTRES = torch.tensor([[-2.0, 0.5], [2.0, -0.5]])
SPREAD = 0.4


class LabelledSource:
    """Two Gaussian clusters.

    Args:
        count: samples.
        known: whether the samples have labels.
    """

    shape: tuple[int, ...] = (2,)

    def __init__(self, count: int = 1200, known: bool = True) -> None:
        self.count = count
        self.clusters = (torch.rand(count, generator=generator("labels")) < 0.75).long()
        counts = torch.bincount(self.clusters).tolist() if known else []
        self.class_counts = dict(enumerate(counts))

    def first_stage(self, run: Path, config: Config, accelerator: Accelerator) -> StoreReader:
        identity: dict[str, Any] = {"kind": "stage", "stage": 0, "count": self.count, "shape": [2]}

        def make(writer: StoreWriter, index: int) -> Tensor:
            first, last = writer.bounds(index)
            noise = torch.randn((last - first, 2), generator=generator("draw", index))
            return CENTRES[self.clusters[first:last]] + SPREAD * noise

        labels = None
        if config.velocity.classes:
            labels = lambda first, last: self.clusters[first:last]  # noqa: E731
        size = config.latents.shard_size
        return ensure_stage(run, identity, self.count, size, make, accelerator, labels=labels)

    def manifest(self, name: str) -> Manifest:
        return synthetic_manifest(name, self.shape)
