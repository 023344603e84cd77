"""Throughput of a device: images and latents per second, peak memory, Inception features.

    make bench-gpu
    python -m tests.benchmarks.throughput [--device cpu] [--seconds 20] [--tiny]

It runs on the best device of the machine. Each row repeats its work for the given seconds after
two rounds of warming up, and waits for the device before it reads the clock. Peak memory is that
of the allocator on a GPU and the resident memory of the process on a CPU, which never shrinks.

encode       the encoder of `rgb32-kl-8x8` on images of 32 × 32, as `jkoflow encode` calls it
train, fm    an optimiser step of the UNet of `cifar10`, by flow matching with Muon
train, jko   the same network as a JKO block: RK4 on two sub-intervals, Hutchinson's divergence
train, mnist an optimiser step of the first block of `mnist`, as shipped (finite differences)
generate     noise to images of 32 × 32: the flow of `cifar10` with its solver, and its decoder
FID          features of Inception, from images of 32 × 32

The weights of the flow are random; time does not depend on them. `reading` is the part of a step
that takes the samples of the next batch from the disk's cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from autoencoders.base import to_float, to_uint8
from autoencoders.weights import load_weights, locate_weights
from eval.features.inception import FidInception
from flows.spec import BlockSpec, build_block
from pipeline.assets.fetch import fetch_asset
from pipeline.config.load import load_config
from pipeline.config.schema import Config
from pipeline.runtime.devices import make_accelerator
from pipeline.runtime.rng import generator
from pipeline.runtime.system import peak_memory
from pipeline.storage.shards.reader import StoreReader
from pipeline.storage.shards.writer import StoreWriter
from pipeline.training.block_trainer import BlockTrainer

_WARM_UP = 2
_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        rate: samples per second.
        memory: peak, MiB.
        reading: part of the time that reads samples; NaN where none are read.
    """

    name: str
    batch: int
    precision: str
    rate: float
    memory: float
    reading: float = math.nan


def synchronize(device: torch.device) -> None:
    """Wait for the work of a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@contextmanager
def measured_memory(device: torch.device) -> Iterator[Callable[[], float]]:
    """Yield a function that returns the peak memory since here, MiB."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device) / _MIB
    elif device.type == "mps":
        yield lambda: torch.mps.driver_allocated_memory() / _MIB
    else:
        yield lambda: peak_memory() / _MIB


def timed(
    name: str, batch: int, precision: str, device: torch.device, seconds: float,
    work: Callable[[], Any], read: Callable[[], Any] | None = None,
) -> Row:  # fmt: skip
    """Repeat the work on a batch for some seconds, at least once."""
    with measured_memory(device) as memory:
        for _ in range(_WARM_UP if seconds else 0):
            work()
        synchronize(device)
        began, rounds = time.perf_counter(), 0
        while not rounds or time.perf_counter() - began < seconds:
            work()
            rounds += 1
        synchronize(device)
        spent = (time.perf_counter() - began) / rounds
        share = math.nan
        if read is not None:
            began = time.perf_counter()
            for _ in range(rounds):
                read()
            share = (time.perf_counter() - began) / rounds / spent
        return Row(name, batch, precision, batch / spent, memory(), share)


# ---------------------------------------------------------------------------------- the rows


def encoding(device: torch.device, batch: int, seconds: float) -> Row:
    """Pixels on the host to moments on the host."""
    model = load_weights(locate_weights("rgb32-kl-8x8")).to(device)
    images = to_uint8(torch.rand(batch, *model.image_shape, generator=generator(0)) * 2 - 1)

    @torch.inference_mode()
    def work() -> None:
        model.encode(to_float(images).to(device)).mean.float().cpu()

    return timed("encode, images/s", batch, "fp32", device, seconds, work)


def samples(folder: Path, shape: tuple[int, ...], count: int, classes: int) -> StoreReader:
    """A stage of Gaussian samples with classes."""
    writer = StoreWriter(folder, {"kind": "stage", "stage": 0, "shape": list(shape)}, count, count)
    z = torch.randn(count, *shape, generator=generator(1))
    writer.write(0, {"z": z, "labels": torch.arange(count) % max(1, classes)})
    return writer.finish()


def training(
    name: str, config: Config, shape: tuple[int, ...], accelerator: Accelerator, seconds: float
) -> Row:
    """Steps of an optimiser, from samples on the disk."""
    recipe = config.train
    jko = config.jko is not None
    spec = BlockSpec(
        velocity=config.velocity, objective="jko" if jko else "lfm", h=0.5 if jko else None,
        **({"solver": config.jko.solver.of_block(0)} if config.jko else {}),
    )  # fmt: skip
    options = config.jko if config.jko is not None else config.regression
    block = build_block(spec, shape, generator(2))
    with tempfile.TemporaryDirectory() as folder:
        count = 4 * recipe.batch_size
        stage = samples(Path(folder) / "stage-00", shape, count, config.velocity.classes)
        trainer = BlockTrainer(block, spec, stage, recipe, options, accelerator)

        def read() -> None:
            rows = trainer.batches.indices(trainer.done)
            stage.take("z", rows)
            trainer.batches.labels(rows)

        precision, device = recipe.precision, accelerator.device
        return timed(name, recipe.batch_size, precision, device, seconds, trainer.step, read)


def generating(config: Config, device: torch.device, batch: int, seconds: float) -> Row:
    """Noise on the host to pixels on the host."""
    decoder = load_weights(locate_weights("rgb32-kl-8x8")).to(device)
    sampler, shape = config.sampler.of_block(0), decoder.latent_shape
    velocity = dataclasses.replace(config.velocity, classes=0, class_dropout=0.0)
    spec = BlockSpec(velocity=velocity, objective="lfm")
    block = build_block(spec, shape, generator(3)).eval().to(device)
    noise = torch.randn(batch, *shape, generator=generator(4))

    @torch.inference_mode()
    def work() -> None:
        z = block.transport(noise.to(device), reverse=True, solver=sampler).z
        to_uint8(decoder.decode(z)).cpu()

    return timed("generate, images/s", batch, "fp32", device, seconds, work)


def inception(device: torch.device, batch: int, seconds: float) -> Row:
    """Pixels on the host to features on the host."""
    network = FidInception.from_weights(fetch_asset("inception")).to(device)
    images = torch.randint(256, (batch, 3, 32, 32), generator=generator(5), dtype=torch.uint8)
    return timed("FID features/s", batch, "fp32", device, seconds,
                 lambda: network.features(images).cpu())  # fmt: skip


def measure(accelerator: Accelerator, seconds: float, tiny: bool) -> list[Row]:
    """All rows; tiny ones show that they run."""
    device, changes = accelerator.device, []
    if tiny:
        changes = ["train.batch_size=2", "velocity.width=16", "velocity.depth=1"]
    many = 2 if tiny else 256
    shape = load_weights(locate_weights("rgb32-kl-8x8")).latent_shape
    cifar10 = load_config("cifar10", [*changes, "train.precision=fp32"])
    half = load_config("cifar10", changes)
    jko = [
        *changes, "train.objective=jko", "jko.divergence=hutchinson",
        "generate.guidance=1",
    ]  # fmt: skip
    rows = [encoding(device, many, seconds)]
    rows.append(training("train, fm, latents/s", cifar10, shape, accelerator, seconds))
    rows.append(training("train, fm, latents/s", half, shape, accelerator, seconds))
    for precision in ("fp32", "bf16"):
        config = load_config("cifar10", [*jko, f"train.precision={precision}"])
        rows.append(training("train, jko, latents/s", config, shape, accelerator, seconds))
    mnist = load_config("mnist", changes)
    rows.append(training("train, mnist, latents/s", mnist, (3, 4, 4), accelerator, seconds))
    rows.append(generating(cifar10, device, many, seconds))
    rows.append(inception(device, many, seconds))
    return rows


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    lines = ["| | batch | precision | per second | peak MiB | reading |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        reading = "" if math.isnan(row.reading) else f"{row.reading:.1%}"
        lines.append(
            f"| {row.name} | {row.batch} | {row.precision} | {row.rate:.1f} | {row.memory:.0f} | "
            f"{reading} |"
        )
    return "\n".join(lines)


def describe(device: torch.device) -> str:
    """Name the device, the threads and PyTorch."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return f"{device} {name}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}"


def main(arguments: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description="throughput of a device")
    parser.add_argument("--device", help="cpu, cuda, cuda:N or mps; default: the best one")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each row")
    parser.add_argument("--tiny", action="store_true", help="two samples, to see that it runs")
    args = parser.parse_args(arguments)
    accelerator = make_accelerator(args.device)
    rows = measure(accelerator, 0.0 if args.tiny else args.seconds, args.tiny)
    print(describe(accelerator.device))
    print(table(rows))
    return rows


if __name__ == "__main__":
    main()
