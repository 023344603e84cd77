"""Arithmetic of plans, on a measurement that is made up."""

from __future__ import annotations

import dataclasses

import pytest

from pipeline.errors import UserError
from pipeline.planning.devices import DEVICES, device_of
from pipeline.planning.estimate import (
    BlockCost,
    Hardware,
    Measurement,
    Rate,
    Step,
    Work,
    estimate,
    stage_sizes,
    total,
)
from pipeline.planning.report import parse_count, plan_json, plan_lines

BLOCKS = (
    BlockCost(100, Rate(0.5, 4e9, "bf16", 900.0), Rate(0.01, 1e6, memory=300.0), weights=1000),
    BlockCost(200, Rate(0.5, 4e9, "bf16", 900.0), Rate(0.01, 1e6, memory=300.0), weights=1000),
)
MEASURED = Measurement(
    machine="a machine",
    date="2026-01-01",
    config="made up",
    batch=64,
    copies=2,
    draws=3,
    image_bytes=3072,
    latent_bytes=400,
    stage_bytes=(600, 200),
    encode=Rate(0.002, 1e9, memory=500.0),
    decode=Rate(0.004, 2e9, memory=700.0),
    features=Rate(0.1, 1e10, memory=800.0),
    networks=2,
    blocks=BLOCKS,
    base=200.0,
    state=100.0,
    checkpoint=4000,
    snapshots=4,
)
WORK = Work(images=50_000, generated=1000)
ALONE = Hardware()


def steps(work: Work = WORK, hardware: Hardware = ALONE) -> dict[str, Step]:
    return {step.name: step for step in estimate(MEASURED, work, hardware)}


def test_twice_the_images_take_twice_the_time_and_the_disk_to_encode() -> None:
    twice = steps(dataclasses.replace(WORK, images=100_000))["encode"]
    once = steps()["encode"]
    assert once.seconds == pytest.approx(50_000 * 2 * 0.002)
    assert once.disk == 50_000 * 2 * 400
    assert twice.seconds == pytest.approx(2 * once.seconds) and twice.disk == 2 * once.disk


def test_the_time_of_a_training_is_that_of_its_iterations_or_epochs() -> None:
    assert steps()["train block 0"].seconds == pytest.approx(100 * 0.5)
    assert steps()["train block 1"].seconds == pytest.approx(200 * 0.5)
    longer = steps(dataclasses.replace(WORK, images=10**8))["train block 1"]
    assert longer.seconds == steps()["train block 1"].seconds
    epochs = steps(dataclasses.replace(WORK, epochs=2.0))["train block 1"]
    batches = round(2 * 50_000 * 2 * 3 / 64)
    assert epochs.seconds == pytest.approx(batches * 0.5)


def test_several_processes_share_the_work_at_their_efficiency() -> None:
    eight = steps(hardware=Hardware(gpus=8, efficiency=0.8))
    for name, step in steps().items():
        assert eight[name].seconds == pytest.approx(step.seconds / (8 * 0.8))
        assert eight[name].disk == step.disk


def test_the_time_on_a_device_follows_from_operations_and_its_peak() -> None:
    """n F / (G e u R), with the peak of the precision."""
    device = device_of("h100")
    there = steps(hardware=Hardware(2, device, efficiency=0.5, utilisation=0.25))
    assert there["encode"].seconds == pytest.approx(1e5 * 1e9 / (2 * 0.5 * 0.25 * 67e12))
    training = 100 * 4e9 / (2 * 0.5 * 0.25 * 989e12)
    assert there["train block 0"].seconds == pytest.approx(training)
    own = steps(hardware=Hardware(1, device_of("67"), utilisation=0.25))
    assert own["encode"].seconds == pytest.approx(there["encode"].seconds)  # 2 · 0.5 = 1


def test_many_small_kernels_take_the_time_of_their_launches() -> None:
    """A training step is launched by every process, and other work by one of them."""
    small = Rate(1.0, 1e3, kernels=500.0)
    device = Hardware(4, device_of("H100"))
    assert small.time(100, device) == pytest.approx(100 * 500 * 1e-5 / 4)
    assert dataclasses.replace(small, shared=False).time(100, device) == pytest.approx(0.5)
    large = Rate(1.0, 1e15, kernels=500.0)
    assert large.time(100, device) == pytest.approx(100 * 1e15 / (4 * 0.9 * 0.3 * 67e12))
    assert small.time(100, ALONE) == 100  # its own launches are part of what was measured


def test_sampling_takes_the_networks_of_guidance_and_the_decoder() -> None:
    flow = 2 * (0.01 + 0.01)
    assert steps()["generate"].seconds == pytest.approx(1000 * (flow + 0.004))
    assert steps()["generate"].disk == 1000 * 3072
    floor = 2 * 0.1 + 0.002 + 0.004
    assert steps()["evaluate"].seconds == pytest.approx(1000 * floor)
    assert steps()["evaluate"].disk == 2 * 1000 * 2048 * 4
    bare = steps(dataclasses.replace(WORK, floor=False))["evaluate"]
    assert bare.seconds == pytest.approx(100) and bare.disk == 1000 * 2048 * 4


def test_a_later_stage_has_the_samples_that_are_drawn() -> None:
    assert stage_sizes(MEASURED, WORK) == [300_000, 200 * 64]
    assert stage_sizes(MEASURED, dataclasses.replace(WORK, images=100)) == [600, 600]
    assert steps()["train block 0"].disk == 300_000 * 600 + 5 * 1000
    assert steps()["push to stage 1"].disk == 12_800 * 200


def test_the_first_stage_of_many_latents_takes_no_room() -> None:
    for drawn, disk in ((300_001, 300_000 * 600 + 5 * 1000), (300_000, 5 * 1000)):
        measured = dataclasses.replace(MEASURED, drawn=drawn)
        assert next(s.disk for s in estimate(measured, WORK, ALONE) if "train" in s.name) == disk


def test_a_push_takes_the_time_of_its_samples() -> None:
    assert steps()["push to stage 1"].seconds == pytest.approx(12_800 * 0.01)


def test_a_process_holds_the_state_and_its_share_of_the_activations() -> None:
    """900 bytes are 200 of the program, 100 of state and 600 of activations."""
    assert steps()["train block 0"].memory == 900
    assert steps(hardware=Hardware(gpus=4))["train block 0"].memory == 200 + 100 + 600 / 4


def test_the_cost_is_that_of_all_processes() -> None:
    priced = estimate(MEASURED, WORK, Hardware(gpus=4, price=3.0))
    for step in priced:
        assert step.cost == pytest.approx(4 * 3.0 * step.seconds / 3600)
    summed = total(priced)
    assert summed.cost == pytest.approx(4 * 3.0 * summed.seconds / 3600)
    assert summed.memory == max(step.memory for step in priced)
    assert summed.disk == sum(step.disk for step in priced)
    assert total(estimate(MEASURED, WORK, ALONE)).cost is None


@pytest.mark.parametrize(
    ("text", "count"), [("50000", 50_000), ("1.28M", 1_280_000), ("1b", 10**9), ("20k", 20_000)]
)
def test_numbers_of_images_have_suffixes(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["0", "-3", "M", "", "many", "1e999"])
def test_bad_numbers_of_images_are_refused(text: str) -> None:
    with pytest.raises((ValueError, OverflowError)):
        parse_count(text)


def test_devices_have_names_and_dense_peaks() -> None:
    assert device_of("rtx-4090").name == device_of("RTX 4090").name == "RTX 4090"
    assert all(device.bf16 > device.fp32 > 1e12 and device.source for device in DEVICES)
    for text in ("H1000", "-1", "nan", "inf", "0"):
        with pytest.raises(UserError, match="expected A100, H100"):
            device_of(text)


def test_the_text_and_the_json_have_the_same_steps() -> None:
    hardware = Hardware(gpus=8, price=2.0)
    text = "\n".join(plan_lines(MEASURED, WORK, hardware))
    plain = plan_json(MEASURED, WORK, hardware)
    assert [row["name"] for row in plain["steps"]] == list(steps())
    assert all(f"  {row['name']} " in text for row in plain["steps"])
    assert "n F / (G e u R)" in text and "e = 0.9 for G = 8, u = 0.3" in text
    assert set(plain["images"]) == {"1000000", "100000000", "1000000000"}
    assert set(plain["devices"]) == {device.name for device in DEVICES}
    assert plain["images"]["100000000"][0]["disk"] == 1e8 * 2 * 400
