"""Text and JSON of a plan: steps, sizes of data sets, devices, and what was assumed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from pipeline.planning.devices import DEVICES
from pipeline.planning.estimate import (
    LAUNCH,
    Hardware,
    Measurement,
    Rate,
    Step,
    Work,
    estimate,
    iterations_of,
    total,
)
from pipeline.runtime.console import duration

#: numbers of images of the table of sizes
SCALES = (10**6, 10**8, 10**9)
_SUFFIXES = {"k": 10**3, "M": 10**6, "B": 10**9}
FORMULA = (
    "on this machine: T = n s / (G e)",
    "on another device: T = max(n F / (G e u R), n K τ / P), P = G, but P = 1 for training steps",
    "n units of work, G processes, s measured seconds of a unit, F its operations, K its kernels,",
    "R the published dense peak; assumed are the efficiency e, the utilisation u and the launch τ",
)


def plan_lines(measured: Measurement, work: Work, hardware: Hardware) -> list[str]:
    """Describe a plan: the measurement, the formula, and three tables."""
    return [
        f"measured on {measured.machine}, {measured.date}, config {measured.config}:",
        *(f"  {line}" for line in _measured_lines(measured)),
        "extrapolated from it:",
        *(f"  {line}" for line in FORMULA),
        f"  {_assumptions(hardware)}",
        "",
        f"{_count(work.images)} images on {_hardware(hardware)}:",
        *_table(_step_rows(measured, work, hardware)),
        "",
        f"other numbers of images on {_hardware(hardware)}:",
        *_table(scale_rows(measured, work, hardware)),
        "",
        f"{_count(work.images)} images on {hardware.gpus} of other devices:",
        *_table(device_rows(measured, work, hardware)),
        "",
        "not included: downloads, disk access, likelihoods, previews, measurements of blocks",
    ]


def plan_json(measured: Measurement, work: Work, hardware: Hardware) -> dict[str, Any]:
    """Return a plan as JSON values; seconds, bytes, and the unit of the price."""
    steps = estimate(measured, work, hardware)
    others = {}
    for device in DEVICES:
        there = dataclasses.replace(hardware, device=device, price=None)
        others[device.name] = [
            dataclasses.asdict(step) for step in estimate(measured, work, there)
        ]
    scales = {}
    for images in SCALES:
        scaled = dataclasses.replace(work, images=images)
        scales[str(images)] = [
            dataclasses.asdict(step) for step in estimate(measured, scaled, hardware)
        ]
    return {
        "measured": dataclasses.asdict(measured),
        "formula": list(FORMULA),
        "work": dataclasses.asdict(work),
        "hardware": dataclasses.asdict(hardware),
        "steps": [dataclasses.asdict(step) for step in steps],
        "total": dataclasses.asdict(total(steps)),
        "images": scales,
        "devices": others,
    }


def parse_count(text: str) -> int:
    """Parse a number of images, such as 50000, 1.28M or 1B.

    Raises:
        ValueError: the text is no number of at least 1.
    """
    factor = {name.upper(): size for name, size in _SUFFIXES.items()}.get(text[-1:].upper(), 1)
    digits = text[:-1] if factor > 1 else text
    value = round(float(digits) * factor)
    if value < 1:
        raise ValueError(f"{text} is below 1")
    return value


def scale_rows(measured: Measurement, work: Work, hardware: Hardware) -> list[list[str]]:
    """Return the table of numbers of images, with its head."""
    head = ["images", "encode", "train", "one epoch", "generate", "evaluate", "cache", "run"]
    rows = [head]
    for images in sorted({*SCALES, work.images}):
        scaled = dataclasses.replace(work, images=images)
        rows.append([_count(images), *_times(measured, scaled, hardware)])
        steps = estimate(measured, scaled, hardware)
        cache = sum(step.disk for step in steps if step.name == "encode")
        run = sum(step.disk for step in steps if step.name.startswith(("train", "push")))
        rows[-1] += [_size(cache), _size(run)]
    return rows


def device_rows(measured: Measurement, work: Work, hardware: Hardware) -> list[list[str]]:
    """Return the table of devices, with its head."""
    rows = [["device", "encode", "train", "one epoch", "generate", "evaluate", "fp32", "bf16"]]
    for device in DEVICES:
        there = dataclasses.replace(hardware, device=device)
        peaks = [f"{peak / 1e12:g} TFLOP/s" for peak in (device.fp32, device.bf16)]
        rows.append([device.name, *_times(measured, work, there), *peaks])
    return rows


def _times(measured: Measurement, work: Work, hardware: Hardware) -> list[str]:
    """Return the times of encode, train, one epoch, generate and evaluate."""
    steps = estimate(measured, work, hardware)
    epoch = estimate(measured, dataclasses.replace(work, epochs=1.0), hardware)

    def time_of(rows: list[Step], *begins: str) -> str:
        chosen = [row.seconds for row in rows if row.name.startswith(begins)]
        return duration(sum(chosen)) if chosen else "-"

    training = ("train", "push")
    return [
        time_of(steps, "encode"),
        time_of(steps, *training),
        time_of(epoch, *training),
        time_of(steps, "generate"),
        time_of(steps, "evaluate"),
    ]


def _step_rows(measured: Measurement, work: Work, hardware: Hardware) -> list[list[str]]:
    """Return the table of steps, with its head and the sum."""
    steps = estimate(measured, work, hardware)
    priced = hardware.price is not None
    rows = [["step", "time", "memory of a process", "disk", *(["cost"] if priced else [])]]
    for step in [*steps, total(steps)]:
        cells = [step.name, duration(step.seconds), _size(step.memory), _size(step.disk)]
        rows.append([*cells, *([f"{step.cost:.2f}"] if step.cost is not None else [])])
    counts = {iterations_of(measured, work, block) for block in measured.blocks}
    if len(counts) == 1:
        samples = work.images * measured.copies * measured.draws
        epochs = counts.pop() * measured.batch / samples
        rows.append([f"({epochs:.3g} epochs a block)"] + [""] * (3 + priced))
    return rows


def _measured_lines(measured: Measurement) -> list[str]:
    """Describe the rates that were measured."""

    def line(name: str, rate: Rate, unit: str) -> str:
        achieved = rate.flops / rate.seconds / 1e9 if rate.seconds else 0.0
        return (
            f"{name}: {rate.seconds:.3g} s {unit}, {rate.flops / 1e9:.3g} GFLOP, "
            f"{achieved:.3g} GFLOP/s, {rate.kernels:.3g} kernels"
        )

    lines = []
    if measured.encode is not None:
        lines.append(line("encode", measured.encode, "an image"))
        lines.append(line("decode", measured.decode, "an image"))
    seen: set[int] = set()
    for index, block in enumerate(measured.blocks):
        if id(block.step) in seen:
            continue
        seen.add(id(block.step))
        lines.append(line(f"train block {index}", block.step, f"a batch of {measured.batch}"))
        lines.append(line(f"sample through block {index}", block.push, "a sample"))
    if measured.features is None:
        lines.append("FID features: not measured, the network's weights are absent")
    else:
        lines.append(line("FID features", measured.features, "an image"))
    lines.append(
        f"bytes: {measured.latent_bytes} a latent, {measured.stage_bytes[0]} and "
        f"{measured.stage_bytes[1]} a sample of stage 0 and of later ones, "
        f"{measured.checkpoint:,} a checkpoint, {measured.blocks[0].weights:,} a block"
    )
    return lines


def _assumptions(hardware: Hardware) -> str:
    efficiency = 1.0 if hardware.gpus == 1 else hardware.efficiency
    text = f"assumed: e = {efficiency:g} for G = {hardware.gpus}"
    return f"{text}, u = {hardware.utilisation:g} of the published peak, τ = {LAUNCH * 1e6:g} µs"


def _hardware(hardware: Hardware) -> str:
    device = hardware.device
    name = "this machine" if device is None else f"{device.name} ({device.source})"
    return f"{hardware.gpus} x {name}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align the columns of a table."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _count(value: int) -> str:
    for suffix in ("B", "M", "k"):
        if value >= _SUFFIXES[suffix]:
            return f"{value / _SUFFIXES[suffix]:.3g}{suffix}"
    return str(value)


def _size(value: float) -> str:
    if not value:
        return "-"
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e3:.3g} kB"
