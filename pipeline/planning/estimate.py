"""Arithmetic of a plan: a measurement of one machine → time, memory and disk of every step.

On the machine of the measurement, a step of n units takes

    T = n s / (G e)

seconds, with the measured seconds s of a unit, G processes and their efficiency e. On another
device it takes

    T = max(n F / (G e u R), n K τ / P)

with the counted operations F of a unit, the published peak R in FLOP/s and the utilisation u. The
second term is the time to launch the K kernels of a unit. The units are launched by P = G
processes, but every process launches each training step, so that P = 1. The values of e, u and τ
are assumptions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from pipeline.planning.devices import Device

#: assumed speed-up of G > 1 processes over G; two processes encode 1.78 times as fast as one
EFFICIENCY = 0.9
#: assumed share of a published peak that convolutions and attention of this size reach
UTILISATION = 0.3
#: assumed seconds to launch a kernel from Python
LAUNCH = 1e-5
#: bytes of a feature of the FID network, and of the values of a class
_FEATURE, _LABEL, _FLOAT = 4 * 2048, 8, 4
#: samples that a stage has at least, if the stage before has them (`pipeline.training.stages`)
_LEAST = 10_000


@dataclass(frozen=True)
class Rate:
    """Cost of a unit of work: seconds on the measured machine, and counted operations.

    Attributes:
        seconds: of a unit.
        flops: of a unit: multiplications and additions of matrix products and convolutions.
        precision: fp32 or bf16, by which a device's peak is chosen.
        memory: measured peak memory of a process in this work, in bytes.
        kernels: of a unit, counted: operators that are no views.
        shared: whether every process has units of its own; a training step is of all processes.
    """

    seconds: float
    flops: float
    precision: str = "fp32"
    memory: float = 0.0
    kernels: float = 0.0
    shared: bool = True

    def time(self, count: float, hardware: Hardware) -> float:
        """Return the seconds of `count` units on some hardware."""
        shared = hardware.gpus * (1.0 if hardware.gpus == 1 else hardware.efficiency)
        if hardware.device is None:
            return count * self.seconds / shared
        peak = hardware.device.peak(self.precision)
        launches = count * self.kernels * LAUNCH / (hardware.gpus if self.shared else 1)
        return max(count * self.flops / (shared * hardware.utilisation * peak), launches)


@dataclass(frozen=True)
class BlockCost:
    """Cost of one block.

    Attributes:
        iterations: optimiser steps that the configuration asks for.
        step: an optimiser step of the whole batch.
        push: a sample through the finished block.
        weights: bytes of the block's file.
    """

    iterations: int
    step: Rate
    push: Rate
    weights: int


@dataclass(frozen=True)
class Measurement:
    """Measurement of a configuration on one machine.

    Attributes:
        machine: processor or GPU, and its cores.
        date: of the measurement.
        config: name of the configuration.
        batch: samples of a training batch.
        copies: latents in the cache of an image: 2 with mirror images, else 1.
        draws: samples of stage 0 of a latent.
        image_bytes: of an image as uint8.
        latent_bytes: of a latent in the cache.
        stage_bytes: of a sample of stage 0, and of a later stage.
        drawn: samples from which stage 0 is drawn from the cache and takes no room; None stores
            any number.
        encode: an image → its latent; None for a caller's own latents.
        decode: a latent → an image.
        features: the FID network on an image; None where its weights are absent.
        networks: evaluations of networks in one of the velocity: 2 under guidance.
        blocks: in training order.
        base: memory of the process before a training, in bytes.
        state: weights, gradients, averages and optimiser of a block, in bytes.
        checkpoint: bytes of a checkpoint.
        snapshots: of a block's weights that are kept.
    """

    machine: str
    date: str
    config: str
    batch: int
    copies: int
    draws: int
    image_bytes: int
    latent_bytes: int
    stage_bytes: tuple[int, int]
    encode: Rate | None
    decode: Rate
    features: Rate | None
    networks: int
    blocks: tuple[BlockCost, ...]
    base: float
    state: float
    checkpoint: int
    snapshots: int = 0
    drawn: int | None = None


@dataclass(frozen=True)
class Hardware:
    """Hardware of a plan.

    Attributes:
        gpus: number of processes, a GPU each.
        device: their kind; None is the machine of the measurement.
        efficiency: of several processes, an assumption.
        utilisation: share of a device's peak, an assumption.
        price: of a GPU for an hour; None for none.
    """

    gpus: int = 1
    device: Device | None = None
    efficiency: float = EFFICIENCY
    utilisation: float = UTILISATION
    price: float | None = None


@dataclass(frozen=True)
class Work:
    """Amount of work.

    Attributes:
        images: of the data set.
        generated: images that are sampled for an evaluation.
        floor: whether as many are reconstructed.
        epochs: passes over all samples of stage 0 in every block; None takes the configuration's
            iterations.
    """

    images: int
    generated: int
    floor: bool = True
    epochs: float | None = None


@dataclass(frozen=True)
class Step:
    """Estimate of a step.

    Attributes:
        name: of the step.
        seconds: of all processes together, by the clock.
        memory: of one process, in bytes; 0 where it was not measured.
        disk: bytes that the step writes.
        cost: in the unit of the price; None without a price.
    """

    name: str
    seconds: float
    memory: float
    disk: float
    cost: float | None = field(default=None)


def estimate(measured: Measurement, work: Work, hardware: Hardware) -> list[Step]:
    """Estimate every step of encode, train, generate and evaluate."""
    rows = []
    for name, seconds, memory, disk in _steps(measured, work, hardware):
        cost = None
        if hardware.price is not None:
            cost = hardware.price * hardware.gpus * seconds / 3600
        rows.append(Step(name, seconds, memory, disk, cost))
    return rows


def total(steps: list[Step]) -> Step:
    """Sum up steps: the seconds, the disk and the cost, and the largest memory."""
    costs = [step.cost for step in steps if step.cost is not None]
    return Step(
        "total",
        sum(step.seconds for step in steps),
        max((step.memory for step in steps), default=0.0),
        sum(step.disk for step in steps),
        sum(costs) if costs else None,
    )


def iterations_of(measured: Measurement, work: Work, block: BlockCost) -> int:
    """Return the optimiser steps of a block."""
    if work.epochs is None:
        return block.iterations
    samples = work.images * measured.copies * measured.draws
    return max(1, round(work.epochs * samples / measured.batch))


def stage_sizes(measured: Measurement, work: Work) -> list[int]:
    """Return the number of samples of every stage: that of block 0, then the pushed ones.

    A later stage has as many samples as a later block draws, as `pipeline.training.stages` has.
    """
    sizes = [work.images * measured.copies * measured.draws]
    counts = [iterations_of(measured, work, block) for block in measured.blocks]
    for index in range(1, len(counts)):
        sizes.append(min(sizes[-1], max(max(counts[index:]) * measured.batch, _LEAST)))
    return sizes


def _steps(
    measured: Measurement, work: Work, hardware: Hardware
) -> Iterator[tuple[str, float, float, float]]:
    """Yield name, seconds, memory and disk of every step."""
    latents = work.images * measured.copies
    if measured.encode is not None:
        seconds = measured.encode.time(latents, hardware)
        yield "encode", seconds, measured.encode.memory, latents * measured.latent_bytes
    sizes = stage_sizes(measured, work)
    for index, (block, size) in enumerate(zip(measured.blocks, sizes, strict=True)):
        count = iterations_of(measured, work, block)
        activations = max(0.0, block.step.memory - measured.base - measured.state)
        memory = measured.base + measured.state + activations / hardware.gpus
        disk = block.weights * (1 + measured.snapshots)
        if index == 0 and (measured.drawn is None or size < measured.drawn):
            disk += size * measured.stage_bytes[0]
        yield f"train block {index}", block.step.time(count, hardware), memory, disk
        if index + 1 < len(sizes):
            pushed = sizes[index + 1]
            seconds = block.push.time(pushed, hardware)
            disk = pushed * measured.stage_bytes[1]
            yield f"push to stage {index + 1}", seconds, block.push.memory, disk
    flow = sum(block.push.time(work.generated, hardware) for block in measured.blocks)
    seconds = measured.networks * flow + measured.decode.time(work.generated, hardware)
    memory = max(measured.decode.memory, *(block.push.memory for block in measured.blocks))
    yield "generate", seconds, memory, work.generated * measured.image_bytes
    if measured.features is not None:
        sets = 1 + work.floor
        seconds = measured.features.time(sets * work.generated, hardware)
        if work.floor and measured.encode is not None:
            seconds += measured.encode.time(work.generated, hardware)
            seconds += measured.decode.time(work.generated, hardware)
        yield "evaluate", seconds, measured.features.memory, sets * work.generated * _FEATURE


def stage_bytes(values: int, moments: bool, classes: bool) -> tuple[int, int]:
    """Return the bytes of a sample of stage 0, and of a later stage.

    Args:
        values: of a sample.
        moments: whether stage 0 holds the mean and the deviation of its draws, too.
        classes: whether samples keep their classes.
    """
    later = _FLOAT * values + (_LABEL if classes else 0)
    return later + (2 * _FLOAT * values if moments else 0), later
