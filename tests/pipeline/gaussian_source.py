"""A sample source of Gaussian samples with known covariance, and a configuration for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from pipeline.config.load import load_config
from pipeline.config.schema import Config
from pipeline.runs.manifest import Manifest
from pipeline.runtime.rng import generator
from pipeline.storage.shards.reader import StoreReader
from pipeline.storage.shards.writer import StoreWriter
from pipeline.training.stages import ensure_stage
from tests.pipeline.records import synthetic_manifest

#: the covariance of the paper's two-dimensional Gaussian, scaled down
COVARIANCE = ((1.75, 1.25), (1.25, 1.75))
TINY = (
    "name=gaussian",
    "schedule=null",
    "velocity=null",
    "velocity.kind=linear",
    "latents.shard_size=600",
    "sampler.steps=2",
    "train.iterations=60",
    "train.batch_size=256",
    "train.lr=0.03",
    "train.warmup=1",
    "train.ema=0",
    "train.log_every=20",
)
#: settings of the objectives
OBJECTIVES = {
    "jko": ("jko.solver.steps=1", "jko.divergence=exact", "jko.h=[0.1,0.3,0.9]",
            "schedule.tolerance=0", "schedule.free_block=false"),
    "lfm": ("schedule.tolerance=0", "schedule.free_block=false"),
    "fm": (),
}  # fmt: skip


class GaussianSource:
    """N(mean, covariance), `count` draws of it.

    Args:
        covariance: (D, D).
        count: samples.
        bad: index of an invalid sample; None for none.
        value: of its first coordinate.
    """

    def __init__(
        self,
        covariance: tuple[tuple[float, ...], ...] = COVARIANCE,
        count: int = 1500,
        bad: int | None = None,
        value: float = float("nan"),
    ) -> None:
        self.covariance = torch.tensor(covariance, dtype=torch.float64)
        self.count, self.bad, self.value = count, bad, value
        self.shape: tuple[int, ...] = (len(covariance),)

    def first_stage(self, run: Path, config: Config, accelerator: Accelerator) -> StoreReader:
        factor = torch.linalg.cholesky(self.covariance).float()
        identity: dict[str, Any] = {
            "kind": "stage",
            "stage": 0,
            "covariance": self.covariance.tolist(),
            "count": self.count,
            "shape": list(self.shape),
        }

        def make(writer: StoreWriter, index: int) -> torch.Tensor:
            first, last = writer.bounds(index)
            noise = torch.randn((last - first, *self.shape), generator=generator("draw", index))
            z = noise @ factor.T
            if self.bad is not None and first <= self.bad < last:
                z[self.bad - first, 0] = self.value
            return z

        size = config.latents.shard_size
        return ensure_stage(run, identity, self.count, size, make, accelerator)

    def manifest(self, name: str) -> Manifest:
        return synthetic_manifest(name, self.shape)


def tiny(*overrides: str) -> Config:
    """A configuration that trains linear blocks on it in a second or two: three under jko."""
    chosen = [word for word in overrides if word.startswith("train.objective=")]
    objective = chosen[-1].partition("=")[2] if chosen else "jko"
    return load_config("smoke", [*TINY, *OBJECTIVES.get(objective, ()), *overrides])


def quiet(items: Any, total: int, label: str) -> Any:
    """A progress bar that shows nothing."""
    return items
