"""A frozen field equals the time-dependent one at its time; many frozen blocks are its flow."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flows.errors import FlowError
from flows.flow import Flow
from flows.freezing import freeze, freeze_block, freeze_classes, freeze_flow
from flows.networks.base import Velocity
from flows.networks.config import VelocityConfig
from flows.networks.registry import KINDS, make_velocity
from flows.solving.solver import SolverConfig
from flows.spec import BlockSpec, build_block
from tests.flows.problems import points

SMALL = VelocityConfig(width=8, depth=2, time_features=4, heads=2, zero_init=False)
SHAPES = {"conv": (2, 4, 4), "unet": (2, 4, 4), "dit": (2, 4, 4)}


def randomise(velocity: Velocity) -> Velocity:
    """Give all parameters values other than zero, modulations included."""
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in velocity.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=source)
    return velocity


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_network_is_the_field_at_its_time(kind, classes):
    config = replace(SMALL, kind=kind, classes=classes)
    network = randomise(make_velocity(config, SHAPES.get(kind, (5,)))).double()
    frozen = make_velocity(replace(config, autonomous=True), network.shape).double()
    frozen.load_state_dict(freeze(network, 0.3, 0.25))
    z = points(network, batch=4)
    labels = (torch.tensor([0, 1, 2, 3]),) if classes else ()
    early, late = (torch.tensor(t, dtype=torch.float64) for t in (0.3, 0.9))
    expected = 0.25 * network(early, z, *labels)
    torch.testing.assert_close(frozen(late, z, *labels), expected)
    if kind != "linear":
        assert not torch.allclose(0.25 * network(late, z, *labels), expected)


@pytest.mark.parametrize(("autonomous", "nets"), [(False, 1), (False, 2), (True, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_network_without_classes_is_the_field_of_the_null_label(kind, autonomous, nets):
    config = replace(SMALL, kind=kind, classes=3, autonomous=autonomous, nets=nets)
    spec = BlockSpec(velocity=config)
    block = build_block(spec, SHAPES.get(kind, (5,))).double()
    network = randomise(block.velocity)
    plain = build_block(replace(spec, velocity=replace(config, classes=0)), network.shape).double()
    plain.load_state_dict(freeze_classes(block))
    z, null = points(network, batch=4), torch.full((4,), 3)
    for time in (0.2, 0.9):
        t = torch.tensor(time, dtype=torch.float64)
        expected = network(t, z, null)
        torch.testing.assert_close(plain.velocity(t, z), expected)
        assert not torch.allclose(network(t, z, null - 1), expected)


def test_the_error_of_frozen_blocks_falls_with_the_square_of_their_number():
    spec = BlockSpec(replace(SMALL, kind="mlp", width=16, activation="tanh"))
    block = build_block(spec, (3,), torch.Generator().manual_seed(0)).double()
    randomise(block.velocity)
    z = points(block.velocity, batch=8)
    exact = block.transport(z, solver=SolverConfig("rk4", steps=64)).z
    errors = []
    for count in (4, 8, 16):
        moved = z
        for k in range(count):
            frozen, frozen_spec = freeze_block(block, spec, k / count, (k + 1) / count)
            assert frozen_spec.velocity.autonomous
            moved = frozen.double().transport(moved, solver=SolverConfig("rk4", steps=4)).z
        errors.append(float((moved - exact).abs().max().detach()))
    assert errors[0] > 1e-6
    for coarse, fine in zip(errors[:-1], errors[1:], strict=True):
        assert coarse / fine == pytest.approx(4, rel=0.1)


def test_a_part_of_a_block_freezes_at_its_own_time():
    spec = BlockSpec(replace(SMALL, kind="mlp"), start=0.5, length=0.25)
    part = build_block(spec, (3,), torch.Generator().manual_seed(0))
    frozen, frozen_spec = freeze_block(part, spec)
    assert not frozen_spec.sliced
    z = points(part.velocity, batch=4).float()
    middle = torch.tensor(0.5)
    torch.testing.assert_close(frozen.velocity(middle, z), part.velocity(middle, z))


@pytest.mark.parametrize("interval", [(0.5, 0.5), (-0.1, 0.5), (0.5, 1.1), (0.7, 0.2)])
def test_the_interval_lies_in_the_time_of_the_block(interval):
    spec = BlockSpec(replace(SMALL, kind="mlp"))
    with pytest.raises(FlowError, match="interval to freeze"):
        freeze_block(build_block(spec, (2,)), spec, *interval)


@pytest.mark.parametrize("kind", KINDS)
def test_of_several_networks_the_one_of_the_time_is_frozen(kind):
    spec = BlockSpec(replace(SMALL, kind=kind, nets=2))
    block = build_block(spec, SHAPES.get(kind, (5,))).double()
    network = randomise(block.velocity)
    z = points(network, batch=4)
    start, middle = (torch.tensor(t, dtype=torch.float64) for t in (0.0, 0.5))
    assert not torch.allclose(network.nets[0](middle, z), network.nets[1](middle, z))
    for interval, time in {(0, 0.5): 0.25, (0.5, 1): 0.75, (0, 1): 0.5}.items():
        frozen, frozen_spec = freeze_block(block, spec, *interval)
        assert frozen_spec.velocity == replace(spec.velocity, autonomous=True, nets=1)
        at = torch.tensor(time, dtype=torch.float64)
        expected = (interval[1] - interval[0]) * network(at, z)
        found = frozen.double().velocity(start, z)  # its weights were rounded to float32
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_network_that_sees_images_cannot_be_frozen():
    spec = BlockSpec(replace(SMALL, kind="unet", image_channels=3))
    with pytest.raises(FlowError, match="the block has 3 image channels"):
        freeze_block(build_block(spec, (2, 4, 4)), spec)


def test_a_flow_of_several_blocks_has_no_parts():
    spec = BlockSpec(replace(SMALL, kind="mlp"))
    block = build_block(spec, (2,))
    parts = freeze_flow(Flow.from_blocks((2,), [(spec, block)]), 3)
    assert len(parts) == 3 and all(part.velocity.autonomous for part in parts.specs)
    with pytest.raises(FlowError, match="has 3 blocks; expected one"):
        freeze_flow(parts, 2)
