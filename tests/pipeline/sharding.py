"""Compares a training whose parameters two ranks share with one whose ranks hold all of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from torch import Tensor

from flows.networks.config import VelocityConfig
from flows.networks.image_condition import ImageConditionedNetwork
from flows.solving.solver import SolverConfig
from flows.spec import BlockSpec, build_block
from pipeline.config.schema import Config
from pipeline.config.training import JkoConfig, MatchingConfig, TrainConfig
from pipeline.runtime.rng import generator
from pipeline.runtime.sharding import enable_sharding, gather, refuse_sharding_settings
from pipeline.storage.checkpoints import load_checkpoint
from pipeline.storage.shards.reader import StoreReader
from pipeline.storage.shards.writer import StoreWriter
from pipeline.training.batches.matching_loss import IMAGE
from pipeline.training.block_trainer import BlockTrainer
from pipeline.training.stages import ensure_stage
from tests.pipeline.double import InDouble
from tests.pipeline.gaussian_source import GaussianSource, tiny

SHAPE = (2, 4, 4)
#: objective, step and network of a block, and the class of its parts that are gathered in turn
CASES: dict[str, tuple[str, dict[str, float], VelocityConfig, str]] = {
    "fm": ("lfm", {}, VelocityConfig("dit", width=8, depth=2, heads=2, patch=2, zero_init=False),
           "DitBlock"),
    "lfm": ("lfm", {"gamma": 0.3}, VelocityConfig("unet", width=4, depth=1, zero_init=False),
            "ResidualBlock"),
    "fm, image": ("lfm", {}, VelocityConfig("unet", width=4, depth=1, image_channels=1), ""),
    "lfm, two networks": ("lfm", {"gamma": 0.3}, VelocityConfig("mlp", width=6, depth=2, nets=2),
                          "MlpVelocity"),
    "jko": ("jko", {"h": 0.5}, VelocityConfig("conv", width=5, depth=2, zero_init=False), ""),
}  # fmt: skip
OTHERS = tuple(CASES)[1:]
STEPS, LATER = 3, 2


class GridSource(GaussianSource):
    """Independent Gaussian samples on a grid."""

    shape = SHAPE

    def __init__(self, count: int = 40) -> None:
        self.count = count

    def first_stage(self, run: Path, config: Config, accelerator: Accelerator) -> StoreReader:
        def make(writer: StoreWriter, index: int) -> dict[str, Tensor]:
            first, last = writer.bounds(index)
            source = generator("draw", index)
            channels = {"z": SHAPE[0], IMAGE: 1}
            return {
                name: torch.randn((last - first, count, *SHAPE[1:]), generator=source)
                for name, count in channels.items()
            }

        identity = {"kind": "stage", "stage": 0, "count": self.count, "shape": list(SHAPE)}
        return ensure_stage(run, identity, self.count, 10, make, accelerator)


def compare(accelerator: Accelerator, folder: Path, *cases: str) -> dict[str, Any]:
    """What this rank saw of some cases."""
    return {name: _compare(accelerator, folder / name, name) for name in cases}


def _compare(accelerator: Accelerator, folder: Path, name: str) -> dict[str, Any]:
    environment = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    if CASES[name][3]:
        environment["FSDP_AUTO_WRAP_POLICY"] = "TRANSFORMER_BASED_WRAP"
        environment["FSDP_TRANSFORMER_CLS_TO_WRAP"] = CASES[name][3]
    with mock.patch.dict(os.environ, environment):
        refuse_sharding_settings(os.environ, True)
        accelerator.state.fsdp_plugin = None
        enable_sharding(accelerator, os.environ)
    stage = GridSource().first_stage(folder, tiny(), accelerator)

    def trainer(sharded: bool) -> BlockTrainer:
        return _trainer(accelerator, stage, name, sharded)

    plain, sharded = trainer(False), trainer(True)
    steps = [[each.step().terms for _ in range(STEPS)] for each in (plain, sharded)]
    sharded.keep()  # as where grids are compared; a checkpoint holds it
    plain.keep()
    held = [_held(each) for each in (plain, sharded)]
    for each, file in ((plain, "plain"), (sharded, "sharded")):
        each.save(folder / file)
    accelerator.wait_for_everyone()
    resumed = [trainer(False), trainer(True)]
    resumed[0].load(folder / "sharded")
    resumed[1].load(folder / "plain")
    held.append(_held(resumed[1]))
    for _ in range(LATER):
        for each in (plain, sharded, *resumed):
            each.step()
    weights = [each.weights() for each in (plain, sharded, *resumed)]
    start = _trainer(accelerator, stage, name, False).weights()
    states = [load_checkpoint(folder / file) for file in ("plain", "sharded")]
    for state in states:
        state.pop("seconds")
    return {
        "terms": steps,
        "held": held,
        "moved": max(float((weights[0][key] - start[key]).abs().max()) for key in start),
        "errors": [_difference(weights[0], other) for other in weights[1:]],
        "checkpoint": _difference(*states),
    }


def _trainer(
    accelerator: Accelerator, stage: StoreReader, name: str, sharded: bool
) -> BlockTrainer:
    objective, step, velocity, _ = CASES[name]
    spec = BlockSpec(velocity, SolverConfig("rk4", 2), objective=objective, **step)
    block = build_block(spec, SHAPE, generator(0, "weights", 0))
    if isinstance(block.velocity, ImageConditionedNetwork):
        block.velocity.inner = InDouble(block.velocity.inner)
    else:
        block.velocity = InDouble(block.velocity)
    options = JkoConfig() if objective == "jko" else MatchingConfig()
    recipe = TrainConfig(
        batch_size=10, micro_batch=3, lr=0.01, warmup=0, ema=0.9, grad_clip=0.01
    )  # the norm of every gradient is larger
    target = "pipeline.training.block_trainer.shards_networks"
    with mock.patch(target, lambda _: sharded):
        trainer = BlockTrainer(block, spec, stage, recipe, options, accelerator)
    samples = trainer.batches.samples
    trainer.batches.samples = lambda *part: samples(*part).double()  # type: ignore[method-assign]
    return trainer


def _held(trainer: BlockTrainer) -> dict[str, int]:
    """Bytes that this rank holds of parameters, gradients, moments of Adam and averages."""
    assert trainer.average is not None
    state = trainer.optimizer.state_dict()["state"].values()
    tensors = {
        "parameters": trainer.parameters,
        "gradients": [p.grad for p in trainer.parameters if p.grad is not None],
        "moments": [entry[key] for entry in state for key in ("exp_avg", "exp_avg_sq")],
        "average": list(trainer.average.average.values()),
    }
    return {name: _bytes(values) for name, values in tensors.items()}


def _bytes(tensors: list[Any]) -> int:
    """Bytes of the memory of tensors, some of which may share it."""
    here = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    memory = {part.untyped_storage().data_ptr(): part.untyped_storage() for part in here}
    return sum(storage.nbytes() for storage in memory.values())


def _difference(one: Any, other: Any) -> float:
    """Largest difference of the tensors of two nested states, which agree in all the rest."""
    if isinstance(one, dict):
        assert list(one) == list(other)
        return max((_difference(one[key], other[key]) for key in one), default=0.0)
    if isinstance(one, Tensor):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert gather(one) is one and gather(other) is other
        return float((one.double() - other.double()).abs().max())
    assert one == other
    return 0.0
