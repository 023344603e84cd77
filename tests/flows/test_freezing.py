"""A frozen field equals the time-dependent one at its time; many frozen blocks are its flow."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.func import jvp

from flows.errors import FlowError
from flows.flow import Flow
from flows.freezing import freeze, freeze_block, freeze_classes, freeze_flow
from flows.networks.base import Velocity
from flows.networks.config import VelocityConfig
from flows.networks.registry import KINDS, make_velocity
from flows.refinement import split_block
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


@pytest.mark.parametrize("nets", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_field_of_the_linear_interpolant_is_converted_to_the_trigonometric_one(kind, nets):
    """z_θ = r x_t, so its slope is r' x_t + r (dt / dθ) v(t, x_t), here by finite differences."""
    spec = BlockSpec(replace(SMALL, kind=kind, nets=nets))
    block = build_block(spec, SHAPES.get(kind, (5,))).double()
    network = randomise(block.velocity)
    frozen, frozen_spec = freeze_block(block, spec, 0.5, 0.75, from_linear=True)
    z = points(network, batch=4)

    def place(angle: float) -> tuple[float, float]:
        sine, cosine = math.sin(angle), math.cos(angle)
        return sine + cosine, sine / (sine + cosine)

    angle, step = 0.625 * math.pi / 2, 1e-5
    radius, time = place(angle)
    assert time > 0.5
    (r0, t0), (r1, t1) = place(angle - step), place(angle + step)
    x = z / radius
    v = network(torch.tensor(time, dtype=torch.float64), x)
    slope = ((r1 - r0) * x + radius * (t1 - t0) * v) / (2 * step)
    found = frozen.double().velocity(torch.tensor(0.1, dtype=torch.float64), z)
    torch.testing.assert_close(found, 0.25 * math.pi / 2 * slope, rtol=1e-5, atol=1e-6)
    assert BlockSpec.from_dict(frozen_spec.to_dict()) == frozen_spec
    rebuilt = build_block(frozen_spec, network.shape)
    rebuilt.load_state_dict(frozen.state_dict())
    start = torch.tensor(0.0)
    again = rebuilt.velocity(start, z.float())
    torch.testing.assert_close(again, found.float(), rtol=1e-4, atol=1e-5)


def test_a_skip_connection_adds_to_the_field_its_derivatives_and_its_pieces():
    spec = BlockSpec(replace(SMALL, kind="mlp", nets=2), SolverConfig("rk4", steps=2), skip=-0.7)
    block = build_block(spec, (3,)).double()
    randomise(block.velocity)
    z, t = points(block.velocity, batch=4), torch.tensor(0.7, dtype=torch.float64)
    plain = block.velocity.inner
    torch.testing.assert_close(block.velocity(t, z), plain(t, z) - 0.7 * z)
    tangents = points(block.velocity, batch=8).view(2, 4, 3)
    v, derivatives = block.velocity.directional(t, z, tangents)
    for tangent, derivative in zip(tangents, derivatives, strict=True):
        value, expected = jvp(lambda x: block.velocity(t, x), (z,), (tangent,))
        torch.testing.assert_close(v, value)
        torch.testing.assert_close(derivative, expected)
    late = block.velocity.smooth_pieces()[1]
    assert late.start == 0.5
    torch.testing.assert_close(late.field(t, z), block.velocity(t, z))
    children = split_block(replace(spec, h=0.2), block, 2)
    torch.testing.assert_close(children[1][1](children[0][1](z)), block(z))
    for child, part in children:
        assert build_block(child, (3,)).load_state_dict(part.state_dict())


@pytest.mark.parametrize("skip", [math.nan, math.inf])
def test_a_skip_connection_is_finite(skip):
    with pytest.raises(FlowError, match="skip is"):
        BlockSpec(skip=skip)


def test_a_converted_flow_has_the_map_of_its_block():
    """The error of K converted blocks falls as K⁻², as that of frozen blocks does."""
    spec = BlockSpec(replace(SMALL, kind="mlp", width=16, activation="tanh"))
    block = build_block(spec, (3,), torch.Generator().manual_seed(0)).double()
    randomise(block.velocity)
    z = points(block.velocity, batch=8)
    flow = Flow.from_blocks((3,), [(spec, block)])
    exact = block.transport(z, solver=SolverConfig("rk4", steps=64)).z
    errors = []
    for count in (4, 8, 16):
        moved = z
        for part in freeze_flow(flow, count, from_linear=True):
            moved = part.double().transport(moved, solver=SolverConfig("rk4", steps=4)).z
        errors.append(float((moved - exact).abs().max().detach()))
    assert errors[0] > 1e-6
    for coarse, fine in zip(errors[:-1], errors[1:], strict=True):
        assert coarse / fine == pytest.approx(4, rel=0.1)


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


@pytest.mark.parametrize("linear", [False, True])
def test_a_part_of_a_part_is_frozen(linear: bool) -> None:
    config = VelocityConfig("mlp", width=8, depth=1, zero_init=False)
    spec = BlockSpec(config, SolverConfig(steps=16), h=1.0, start=0.25, length=0.5)
    block, z = build_block(spec, (3,)), torch.randn(4, 3)
    # its field at its own time 0.4, scaled by the length of the part
    frozen, _ = freeze_block(block, spec, 0.2, 0.6, from_linear=linear)
    angle = 0.4 * math.pi / 2
    r = math.cos(angle) + math.sin(angle)
    if linear:
        field = (math.cos(angle) - math.sin(angle)) / r * z
        field = 0.4 * math.pi / 2 * (
            field + block.velocity(torch.tensor(math.sin(angle) / r), z / r) / r
        )
    else:
        field = 0.4 * block.velocity(torch.tensor(0.4), z)
    torch.testing.assert_close(frozen.velocity(torch.tensor(0.0), z), field)
