"""Short measurement of a configuration on this machine: seconds, operations, memory and bytes.

Images and samples are random, and blocks have random weights, so that neither a data set nor a
cache is needed.
"""

from __future__ import annotations

import dataclasses
import math
from datetime import date
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from autoencoders.base import Autoencoder, to_float, to_uint8
from flows.block import Block
from flows.networks.condition import Condition
from flows.spec import BlockSpec
from pipeline.config.data import LATENTS
from pipeline.config.rules.validate import check, check_shape
from pipeline.config.schema import Config
from pipeline.data.datasets import load_images
from pipeline.data.drawn_latents import MANY
from pipeline.data.latent_cache import build_encoder, latent_bytes, open_cache
from pipeline.errors import JkoflowError
from pipeline.evaluation.features import load_inception
from pipeline.planning.estimate import BlockCost, Measurement, Rate, stage_bytes
from pipeline.planning.meter import Meter, convolution_flops, machine_of
from pipeline.runs.passes import Pass
from pipeline.runtime.console import no_progress
from pipeline.runtime.rng import generator
from pipeline.runtime.system import keep_freed_memory
from pipeline.storage import atomic
from pipeline.storage.shards.reader import StoreReader
from pipeline.storage.shards.writer import StoreWriter
from pipeline.training.batches.block_batches import BlockBatches
from pipeline.training.batches.matching_loss import IMAGE
from pipeline.training.block_source import TrainedBlocks, TrainingContext
from pipeline.training.block_trainer import BlockTrainer
from pipeline.training.planner import next_pass
from pipeline.training.stages import ensure_stage

#: seconds that each kind of work is repeated for
SECONDS = 2.0
#: images of data sets whose shape needs no files
_SHAPES = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32), "imagenet32": (3, 32, 32)}
_FEATURES_BATCH, _GENERATED = 50, 50
#: bytes of a class in the cache
_LABEL = 8


def measure(config: Config, accelerator: Accelerator, seconds: float = SECONDS) -> Measurement:
    """Measure a configuration.

    Args:
        config: the configuration.
        accelerator: the device.
        seconds: that each kind of work is repeated for; once at least.

    Raises:
        UserError: the configuration is bad, or its autoencoder is absent.
    """
    check(config)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    autoencoder, image = _autoencoder_and_shape(config)
    if autoencoder is not None:
        latent, stochastic = tuple(autoencoder.latent_shape), autoencoder.stochastic
    else:
        cache = open_cache(config)
        latent, stochastic = cache.shape, cache.stochastic
    refines = config.velocity.image_channels > 0
    shape = image if refines else latent
    check_shape(config, shape)
    meter = Meter(accelerator, seconds)
    encode, decode = None, Rate(0.0, 0.0)
    if autoencoder is not None:
        encode, decode = _measure_autoencoder(config, autoencoder, image, meter)
    random = config.jko is not None and not refines and (stochastic or config.latents.noise > 0)
    with atomic.scratch_folder() as folder:
        source = _NoiseSource(shape, config, random, image)
        context = TrainingContext(config, folder, source, accelerator, no_progress)
        blocks, sizes = _measure_blocks(context, meter)
    guided = config.generate.guide is not None or config.generate.guidance not in (None, 1.0)
    values = math.prod(shape)
    return Measurement(
        machine=machine_of(accelerator.device),
        date=date.today().isoformat(),
        config=config.name,
        batch=config.train.batch_size,
        copies=2 if config.latents.mirror else 1,
        draws=config.latents.draws,
        image_bytes=math.prod(image),
        latent_bytes=latent_bytes(latent, stochastic) + _LABEL,
        # a refiner keeps residuals and images in float16, and has one block
        stage_bytes=(4 * values, 0)
        if refines
        else stage_bytes(values, random, config.velocity.classes > 0),
        encode=encode,
        decode=decode,
        features=_measure_features(image, meter),
        networks=2 if guided else 1,
        blocks=blocks,
        base=sizes["base"],
        state=sizes["state"],
        checkpoint=int(sizes["checkpoint"]),
        snapshots=_snapshots(config, blocks),
        drawn=None if refines else MANY,
    )


class _NoiseSource:
    """Source of a few random samples in place of a latent cache."""

    def __init__(
        self, shape: tuple[int, ...], config: Config, moments: bool, image: tuple[int, ...]
    ) -> None:
        self.shape, self.moments, self.image = shape, moments, image
        self.classes = config.velocity.classes
        self.conditioned = config.velocity.image_channels > 0
        self.count = 2 * config.train.batch_size

    @property
    def labels(self) -> Tensor | None:
        """Return classes (n,) in turn."""
        return torch.arange(self.count) % self.classes if self.classes else None

    @property
    def class_counts(self) -> dict[int, int]:
        """Refuse; nothing asks for it, because no run is written."""
        raise JkoflowError("random samples have no classes")

    def first_stage(self, run: Path, config: Config, accelerator: Accelerator) -> StoreReader:
        """Write the samples."""
        identity: dict[str, Any] = {"kind": "stage", "stage": 0, "shape": list(self.shape)}
        labels = self.labels

        def make(writer: StoreWriter, index: int) -> dict[str, Tensor]:
            first, last = writer.bounds(index)
            size, source = (last - first, *self.shape), generator(0, "plan", index)
            fields = {"z": torch.randn(size, generator=source)}
            if self.moments:
                fields |= {"mean": fields["z"].clone(), "std": torch.full(size, 0.1)}
            if self.conditioned:
                fields[IMAGE] = torch.zeros((last - first, *self.image))
            return fields

        def classes(first: int, last: int) -> Tensor:
            assert labels is not None
            return labels[first:last]

        given = None if labels is None else classes
        size = config.latents.shard_size
        return ensure_stage(run, identity, self.count, size, make, accelerator, labels=given)

    def manifest(self, name: str) -> Any:  # noqa: ANN401
        """Refuse; nothing asks for it, because no run is written."""
        raise JkoflowError("random samples have no manifest")


def _autoencoder_and_shape(config: Config) -> tuple[Autoencoder | None, tuple[int, int, int]]:
    """Build the autoencoder, and return it with the shape of the images."""
    data = config.data
    if data.name == LATENTS:
        return None, (0, 0, 0)
    if data.name in _SHAPES:
        shape = _SHAPES[data.name]
    elif data.size:
        shape = (1 if data.mode == "L" else 3, data.size, data.size)
    else:
        shape = load_images(data).shape
    return build_encoder(config.autoencoder, shape), shape


@torch.inference_mode()
def _measure_autoencoder(
    config: Config, autoencoder: Autoencoder, image: tuple[int, int, int], meter: Meter
) -> tuple[Rate, Rate]:
    """Measure encoder and decoder per image."""
    size = config.latents.batch_size
    model: Any = autoencoder
    model.to(meter.device)
    x = torch.randint(0, 256, (size, *image), generator=generator(0, "plan")).to(torch.uint8)

    def encoded(count: int) -> Tensor:
        return autoencoder.encode(to_float(x[:count]).to(meter.device)).mean.cpu()

    encode = meter.rate(encoded, size, size)
    count = min(_GENERATED, config.generate.batch_size, size)
    z = encoded(1).expand(count, *autoencoder.latent_shape).contiguous().to(meter.device)
    decode = meter.rate(lambda n: to_uint8(autoencoder.decode(z[:n])).cpu(), count, count)
    return encode, _in_batches(decode, count, config)


def _in_batches(rate: Rate, count: int, config: Config) -> Rate:
    """Return the rate of sampling with the kernels shared by a batch of `generate.batch_size`."""
    kernels = rate.kernels * count / config.generate.batch_size
    return dataclasses.replace(rate, kernels=kernels)


def _measure_features(image: tuple[int, int, int], meter: Meter) -> Rate | None:
    """Measure the FID network per image, where its weights can be had."""
    if not math.prod(image):
        return None
    try:
        network = load_inception(meter.accelerator)
    except (JkoflowError, OSError):
        return None
    images = torch.randint(0, 256, (_FEATURES_BATCH, *image), generator=generator(0, "plan"))
    images = images.to(torch.uint8)
    count = len(images)
    rate = meter.rate(lambda n: network.features(images[:n]).cpu(), count, count)
    flops = convolution_flops(network, lambda: network.features(images[:1]))
    return dataclasses.replace(rate, flops=flops)


def _measure_blocks(
    context: TrainingContext, meter: Meter
) -> tuple[tuple[BlockCost, ...], dict[str, float]]:
    """Measure every kind of block once: a training step, and a sample through it."""
    train = dataclasses.replace(context.config.train, warm_start=False, init_from=None)
    config = dataclasses.replace(context.config, train=train)
    context = dataclasses.replace(context, config=config)
    plan = next_pass(config, ())
    assert plan is not None
    source, stage = TrainedBlocks(context, None), context.first_stage()
    known: dict[str, tuple[Rate, Rate, int]] = {}
    sizes: dict[str, float] = {}
    blocks = []
    for index in range(len(plan.steps) + plan.free):
        spec, block = source.initial([plan], index)
        solver = config.sampler.of_block(index)
        kind = repr((dataclasses.replace(spec, h=None, gamma=None), solver))
        if kind not in known:
            if not sizes:
                sizes["base"] = 0.0 if meter.device.type == "cuda" else meter.memory()
            known[kind] = _measure_block(context, plan, spec, block, index, stage, meter, sizes)
        step, push, weights = known[kind]
        blocks.append(BlockCost(plan.iterations[index], step, push, weights))
    return tuple(blocks), sizes


def _measure_block(
    context: TrainingContext,
    plan: Pass,
    spec: BlockSpec,
    block: Block,
    index: int,
    stage: StoreReader,
    meter: Meter,
    sizes: dict[str, float],
) -> tuple[Rate, Rate, int]:
    """Measure a block: step, push and bytes of weights; enter the sizes of its training."""
    config = context.config
    recipe = dataclasses.replace(
        config.train, iterations=10**6, lr=plan.lr[index], warmup=10**6  # hardly moves
    )
    options = config.jko or config.regression
    trainer = BlockTrainer(block, spec, stage, recipe, options, context.accelerator)

    def take_step(size: int) -> None:
        trainer.recipe = dataclasses.replace(recipe, batch_size=size)
        trainer.objective.batches = BlockBatches(spec, stage, trainer.recipe)
        trainer.step()

    step = meter.rate(take_step, recipe.batch_size, 1, config.train.precision)
    step = dataclasses.replace(step, shared=False)
    path = context.folder / "checkpoint.safetensors"
    trainer.save(path)
    sizes.setdefault("checkpoint", path.stat().st_size)
    sizes["state"] = max(sizes.get("state", 0.0), state_bytes(trainer))
    weights = context.folder / "weights.safetensors"
    finished = trainer.finish()
    atomic.write_tensors(weights, finished.state_dict())
    count = min(_GENERATED, len(stage))
    z = stage.read("z", 0, count).float().to(meter.device)
    labels = stage.read("labels", 0, count) if block.velocity.classes else None
    image = stage.read(IMAGE, 0, count) if config.velocity.image_channels else None
    solver = config.sampler.of_block(index)

    def transport(size: int) -> Tensor:
        some, pictures = (None if x is None else x[:size] for x in (labels, image))
        given = None if some is None and pictures is None else Condition(some, image=pictures)
        with torch.inference_mode():
            return finished.transport(z[:size], solver=solver, condition=given).z.cpu()

    push = meter.rate(transport, count, count, config.generate.precision)
    return step, _in_batches(push, count, config), weights.stat().st_size


def state_bytes(trainer: BlockTrainer) -> float:
    """Return the bytes of the weights, gradients, averages and optimiser of a training."""
    parameters = sum(p.numel() * p.element_size() for p in trainer.parameters)
    copies = 2 + (trainer.average is not None)  # weights, gradients and averages
    return float(copies * parameters + _tensor_bytes(trainer.optimizer.state_dict()))


def _tensor_bytes(value: Any) -> int:  # noqa: ANN401 - a state dict
    """Sum the bytes of the tensors in nested dictionaries and lists."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        value = list(value.values())
    return sum(map(_tensor_bytes, value)) if isinstance(value, (list, tuple)) else 0


def _snapshots(config: Config, blocks: tuple[BlockCost, ...]) -> int:
    """Return the number of snapshots of the block that flow matching keeps."""
    every = config.fm.snapshot_every if config.fm is not None else 0
    return blocks[0].iterations // every if every else 0
