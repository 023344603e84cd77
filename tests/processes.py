"""Jobs for two real processes, started by torchrun; each leaves what it saw in a file.

torchrun --nproc_per_node 2 -m tests.processes JOB FOLDER
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator

from autoencoders.base import to_float
from flows.errors import SolveError
from flows.flow import Flow
from flows.spec import BlockSpec, build_block
from pipeline.autoencoder_training.trainer import AutoencoderTrainer
from pipeline.config.autoencoder import AutoencoderTraining
from pipeline.config.sampling import GenerateConfig, SamplerConfig
from pipeline.config.schema import Config
from pipeline.config.training import JkoConfig, MatchingConfig, TrainConfig
from pipeline.errors import UserError
from pipeline.evaluation.features import SHARD, FeatureExtractor
from pipeline.runs.passes import Pass
from pipeline.runtime.rng import generator
from pipeline.runtime.sharding import enable_sharding
from pipeline.sampling.generate import sample_images
from pipeline.sampling.sampling_plan import SamplingPlan
from pipeline.training.block_trainer import BlockTrainer
from pipeline.training.train import train
from tests.autoencoders.models import blobs, config
from tests.pipeline.gaussian_source import GaussianSource, quiet, tiny
from tests.pipeline.records import synthetic_manifest
from tests.pipeline.sharding import OTHERS, compare

ROOT = Path(__file__).parents[1]
RANKS = 2


def run_job(job: str, folder: Path, **variables: str) -> list[Any]:
    """Run a job on two processes with variables; what each of them saw, by rank."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        "--nproc_per_node", str(RANKS), "-m", "tests.processes", job, str(folder),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


def codebook(accelerator: Accelerator, folder: Path) -> Any:
    """How a codebook starts, and the latents of this process's images that it may start on."""
    recipe = AutoencoderTraining(batch_size=8, lr=1e-12, adversarial_weight=0.0)
    training = AutoencoderTrainer(config(flavour="vq"), recipe, accelerator)
    mine = blobs(8)[accelerator.process_index :: accelerator.num_processes]
    with torch.no_grad():
        latents = training.model.encode(to_float(mine)).mean.permute(0, 2, 3, 1).reshape(-1, 2)
    training.step(mine, torch.Generator().manual_seed(accelerator.process_index))
    assert training.model.quantize is not None
    entries = training.model.quantize.embedding.weight.detach()
    return {"entries": entries.tolist(), "latents": latents.tolist()}


def _named(error: Exception) -> list[str]:
    return [type(error).__name__, str(error)]


def block(accelerator: Accelerator, folder: Path, objective: str, size: float) -> Any:
    """How a step ends whose batch holds one sample of a size, on one of the processes."""
    stage = GaussianSource(count=8, bad=3, value=size).first_stage(folder, tiny(), accelerator)
    spec = BlockSpec(velocity=tiny().velocity, h=None, objective=objective)
    fresh = build_block(spec, (2,), generator(0, "weights", 0))
    options = JkoConfig() if objective == "jko" else MatchingConfig()
    trainer = BlockTrainer(fresh, spec, stage, TrainConfig(batch_size=8), options, accelerator)
    try:
        trainer.step()
    except Exception as error:  # noqa: BLE001 - what it is, is the question
        return _named(error)
    return None


def autoencoder(accelerator: Accelerator, folder: Path) -> Any:
    """How a step of an autoencoder ends that gives NaN on the second process alone."""
    recipe = AutoencoderTraining(batch_size=8, adversarial_weight=0.0)
    training = AutoencoderTrainer(config(), recipe, accelerator)
    if accelerator.process_index == 1:
        training.model.decoder.conv_out.bias.data.fill_(float("nan"))
    try:
        training.step(blobs(4), torch.Generator().manual_seed(0))
    except Exception as error:  # noqa: BLE001
        return _named(error)
    return None


def stage(accelerator: Accelerator, folder: Path) -> Any:
    """How the making of a stage ends that one process finds NaN in."""
    try:
        source = GaussianSource(count=8, bad=5)
        source.first_stage(folder, tiny("latents.shard_size=4"), accelerator)
    except Exception as error:  # noqa: BLE001
        return _named(error)
    return None


def features(accelerator: Accelerator, folder: Path) -> Any:
    """How the making of features ends when the images of one process's shard cannot be had."""
    extractor = FeatureExtractor(accelerator, quiet)
    network: Any = SimpleNamespace(features=lambda images: torch.zeros(len(images), 3))
    extractor._inception = network

    def make(first: int, last: int, index: int) -> torch.Tensor:
        if index == 1:
            raise UserError(f"the images of shard {index} are not there")
        return torch.zeros(last - first, 1, 2, 2, dtype=torch.uint8)

    try:
        extractor.features(folder / "features", {"kind": "real"}, 2 * SHARD, make, "real")
    except Exception as error:  # noqa: BLE001
        return _named(error)
    return None


def images(accelerator: Accelerator, folder: Path) -> Any:
    """How generation ends when the flow cannot be followed on the second process alone."""
    run: Any = SimpleNamespace(
        folder=folder, fingerprint="none", flow=Flow((2,)), autoencoder=lambda: None,
        config=SimpleNamespace(sampler=SamplerConfig("rk4", 1)),
        manifest=synthetic_manifest("none", (2,)).with_passes(
            [Pass("ordinary", [], False, None, [], [], [])]
        ),
    )  # fmt: skip

    def sample(*_: Any) -> torch.Tensor:
        if accelerator.process_index == 1:
            raise SolveError("it is not finite", 0.5)
        return torch.zeros(500, 1, 2, 2, dtype=torch.uint8)

    plan = SamplingPlan(run, GenerateConfig(batch_size=500), ())
    try:
        with mock.patch("pipeline.sampling.generate._sample", sample):
            sample_images(plan, 1000, 0, accelerator, quiet)  # two shards
    except Exception as error:  # noqa: BLE001
        return _named(error)
    return None


def clock(accelerator: Accelerator, folder: Path, ahead: int) -> Any:
    """How a training ends whose time is up by the clock of one process alone."""
    now = iter([0.0]) if accelerator.process_index == ahead else repeat(0.0)
    clocks = SimpleNamespace(monotonic=lambda: next(now, 1e6))
    config = tiny("train.max_minutes=1", "train.iterations=6")
    with mock.patch("pipeline.training.block_loop.time", clocks):
        done = train(config, folder / "run", accelerator, quiet, False, GaussianSource(count=64))
    return [done.trained, done.complete]


#: two networks in one block
NETWORKS = ("train.objective=fm", "velocity.kind=mlp", "velocity.width=8", "velocity.depth=1",
         "velocity.nets=2", "sampler.steps=4", "train.iterations=12", "fm.snapshot_every=5",
         "train.lr=0.01", "train.ema=0.9", "train.log_every=4")  # fmt: skip


def two_networks(*overrides: str) -> Config:
    """A configuration of two networks whose gradients are clipped by the norm over both."""
    config = tiny(*NETWORKS, *overrides)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, grad_clip=0.5))


def networks(accelerator: Accelerator, folder: Path, halt: bool) -> Any:
    """Whether a training of two networks is complete."""
    config = two_networks(*(("train.max_minutes=1e-9",) if halt else ()))
    source = GaussianSource(count=64)
    return train(config, folder / "run", accelerator, quiet, True, source).complete


def jko_flow(accelerator: Accelerator, folder: Path) -> Any:
    """How a training of two JKO blocks ends whose grids are compared."""
    config = tiny(
        "jko.divergence=finite-difference", "jko.h=[0.1,0.3]", "velocity.kind=mlp",
        "velocity.width=8", "velocity.depth=2", "train.iterations=100", "train.lr=0.003",
        "train.ema=0.9", "train.batch_size=32",
    )  # fmt: skip
    done = train(config, folder / "run", accelerator, quiet, False, GaussianSource(count=64))
    return [done.trained, done.complete]


JOBS: dict[str, Callable[[Accelerator, Path], Any]] = {
    "codebook": codebook,
    "autoencoder": autoencoder,
    "stage": stage,
    "features": features,
    "images": images,
    "first clock": partial(clock, ahead=0),
    "second clock": partial(clock, ahead=1),
    "jko flow": jko_flow,
    "sharded fm": lambda *job: compare(*job, "fm"),
    "sharded others": lambda *job: compare(*job, *OTHERS),
    "networks": partial(networks, halt=False),
    "networks, halted": partial(networks, halt=True),
    "unsolvable": partial(block, objective="jko", size=float("1e38")),
    "infinite": partial(block, objective="lfm", size=1e30),
    "ordinary": partial(block, objective="lfm", size=1.0),
}


def main() -> None:
    job, folder = sys.argv[1], Path(sys.argv[2])
    accelerator = Accelerator(cpu=True)
    enable_sharding(accelerator, os.environ)
    assert accelerator.num_processes == RANKS
    seen = JOBS[job](accelerator, folder)
    (folder / f"{accelerator.process_index}.json").write_text(json.dumps(seen))
    accelerator.wait_for_everyone()
    # what was seen is written; PyTorch's threads now and then abort a process that takes Python
    # down, after all of ours is done (seen once in five times with the job "unsolvable")
    os._exit(0)


if __name__ == "__main__":
    main()
