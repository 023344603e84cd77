"""Three small networks in a block, trained alone or together from Python."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from pipeline.config.schema import Config
from pipeline.training.networks.train_network import train_network
from pipeline.training.sources import SampleSource
from pipeline.training.train import Outcome, train
from tests.pipeline.gaussian_source import GaussianSource, quiet, tiny

NETS = 3
SETTINGS = (
    "train.objective=fm", "velocity.kind=mlp", "velocity.width=8", "velocity.depth=1",
    f"velocity.nets={NETS}", "sampler.steps=6", "train.iterations=12", "train.lr=0.01",
    "train.ema=0.9", "train.log_every=4", "train.batch_size=20",
)  # fmt: skip


def settings(*overrides: str, clip: float = 0.0) -> Config:
    config = tiny(*SETTINGS, *overrides)
    return replace(config, train=replace(config.train, grad_clip=clip))


def alone(
    config: Config, run: Path, network: int, resume: bool = True, source: Any = None
) -> bool:
    source = source or GaussianSource(count=300)
    return train_network(config, run, Accelerator(), quiet, resume, network, source)


def together(config: Config, run: Path, source: SampleSource | None = None) -> Outcome:
    source = source or GaussianSource(count=300)
    return train(config, run, Accelerator(), quiet, False, source)


def weights_of(run: Path) -> bytes:
    return (run / "blocks" / "block-00.safetensors").read_bytes()
