"""Wider networks that start as the same field."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from flows.block import Block
from flows.net2net import becomes_several, transform_block, widening_factor
from flows.networks.condition import Condition
from flows.networks.config import VelocityConfig
from flows.solving.solver import SolverConfig
from flows.spec import BlockSpec, build_block

GRIDS = {
    "unet": ((3, 8, 8), VelocityConfig("unet", 16, 2, heads=4, time_features=8, classes=5)),
    "unet without attention": ((4, 4, 4), VelocityConfig("unet", 8, 1, heads=0, time_features=8)),
    "unet of three levels": (
        (2, 16, 8), VelocityConfig("unet", (8, 16, 8), 1, heads=2, time_features=8, classes=2)
    ),
    "conv": ((2, 4, 4), VelocityConfig("conv", 6, 3, time_features=8)),
    "resmlp": ((7,), VelocityConfig("resmlp", 5, 2, time_features=8, classes=2)),
    "two networks": ((7,), VelocityConfig("resmlp", 5, 2, time_features=8, nets=2)),
}


def trained(config: VelocityConfig, shape: tuple[int, ...]) -> tuple[BlockSpec, Block]:
    """A block none of whose weights are zero, in float64."""
    spec = BlockSpec(velocity=config)
    block = build_block(spec, shape, torch.Generator().manual_seed(1)).double()
    generator = torch.Generator().manual_seed(2)
    for parameter in block.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data += 0.3 * noise
    return spec, block


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("name", list(GRIDS))
def test_a_widened_network_is_the_same_field(name: str, factor: int) -> None:
    shape, config = GRIDS[name]
    spec, block = trained(config, shape)
    wider = config.widened(factor)
    torch.set_default_dtype(torch.float64)
    try:
        wide = transform_block(block, spec, dataclasses.replace(spec, velocity=wider), seeded())
    finally:
        torch.set_default_dtype(torch.float32)
    z = torch.randn(6, *shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    t = torch.linspace(0, 0.99, 6, dtype=torch.float64)
    labels = (torch.arange(6) % (config.classes + 1),) if config.classes else ()
    with torch.no_grad():
        ours, theirs = wide.velocity(t, z, *labels), block.velocity(t, z, *labels)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))
    assert sum(p.numel() for p in wide.parameters()) > 1.5 * sum(
        p.numel() for p in block.parameters()
    )


def test_copies_part_ways() -> None:
    """Equal shares would give the copies of a feature the same gradient, for ever."""
    shape, config = GRIDS["unet"]
    spec, block = trained(config, shape)
    wide = transform_block(block, spec, wide_spec(spec, 32), seeded())
    z, t = torch.randn(4, *shape), torch.rand(4)
    wide.velocity(t, z, torch.zeros(4, dtype=torch.long)).square().sum().backward()
    gradient = wide.velocity.input.weight.grad
    even, odd = gradient[0::2], gradient[1::2]
    assert float((even - odd).norm()) > 0.1 * float(even.norm())
    torch.testing.assert_close(*wide.velocity.input.weight.detach().view(16, 2, -1).unbind(1))


def test_wider_and_with_other_classes_at_once() -> None:
    """Every class starts as the null label did."""
    shape, config = GRIDS["unet"]
    spec, block = trained(config, shape)
    after = dataclasses.replace(spec, velocity=dataclasses.replace(config, width=32, classes=3))
    wide = transform_block(block.float(), spec, after, seeded())
    z, t = torch.randn(4, *shape), torch.rand(4)
    none = block.velocity(t, z, torch.full((4,), 5)).detach()
    for label in range(4):
        actual = wide.velocity(t, z, torch.full((4,), label))
        torch.testing.assert_close(actual, none, rtol=1e-4, atol=1e-4 * float(none.abs().max()))


@pytest.mark.parametrize("width", [16, 32])
@pytest.mark.parametrize("part", [(0.0, 1.0), (0.5, 0.5)])
def test_several_networks_start_as_copies_of_one(width: int, part: tuple[float, float]) -> None:
    shape, config = GRIDS["unet"]
    spec, whole = trained(config, shape)
    spec = dataclasses.replace(spec, start=part[0], length=part[1])
    block = build_block(spec, shape)
    weights = zip(block.state_dict(), whole.state_dict().values(), strict=True)
    block.load_state_dict(dict(weights))
    several = dataclasses.replace(config, nets=2, width=width)
    after = dataclasses.replace(spec, velocity=several)
    transformed = transform_block(block, spec, after, seeded())
    assert set(transformed.state_dict()) == set(build_block(after, shape).state_dict())
    z, t, labels = torch.randn(6, *shape), torch.linspace(0, 0.99, 6), torch.arange(6)
    ours, theirs = transformed.velocity(t, z, labels), block.velocity(t, z, labels)
    near = 1e-4 * float(theirs.detach().abs().max())
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=near)


def test_what_can_become_several() -> None:
    one = VelocityConfig("unet", 16)
    assert becomes_several(one, dataclasses.replace(one, nets=3))
    two = dataclasses.replace(one, nets=2)
    assert not becomes_several(one, one)
    assert not becomes_several(two, dataclasses.replace(two, nets=4))


def test_what_can_be_widened() -> None:
    unet = VelocityConfig("unet", 16)
    assert widening_factor(unet, unet) == 1
    assert widening_factor(unet, dataclasses.replace(unet, width=48)) == 3
    assert widening_factor(unet, dataclasses.replace(unet, width=24)) is None
    assert widening_factor(dataclasses.replace(unet, width=32), unet) is None
    levels = VelocityConfig("unet", (16, 8, 32))
    assert widening_factor(levels, dataclasses.replace(unet, width=(48, 24, 96))) == 3
    assert widening_factor(levels, dataclasses.replace(unet, width=(48, 24, 64))) is None
    assert widening_factor(levels, dataclasses.replace(unet, width=(32, 16))) is None
    assert widening_factor(unet, levels) is None
    odd, double = VelocityConfig("unet", 12), VelocityConfig("unet", 24)
    assert widening_factor(odd, double) is None  # 8 groups do not divide 12 features
    assert widening_factor(VelocityConfig("conv", 12), VelocityConfig("conv", 24)) == 2
    assert widening_factor(VelocityConfig("mlp", 12), VelocityConfig("mlp", 24)) is None


def wide_spec(spec: BlockSpec, width: int) -> BlockSpec:
    return dataclasses.replace(spec, velocity=dataclasses.replace(spec.velocity, width=width))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(4)


@pytest.mark.parametrize("kind", ["mlp", "resmlp", "conv", "dit", "linear"])
@pytest.mark.parametrize("nets", [1, 2])
def test_an_autonomous_network_gets_classes(kind: str, nets: int) -> None:
    shape = (3, 4, 4) if kind in ("conv", "dit") else (6,)
    one = VelocityConfig(kind, width=8, depth=2, heads=2, time_features=4, autonomous=True,
                         zero_init=False)  # fmt: skip
    several = dataclasses.replace(one, classes=3, nets=nets)
    source = torch.Generator().manual_seed(0)
    before, after = (BlockSpec(each, SolverConfig(), h=1.0) for each in (one, several))
    block = build_block(before, shape, source)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=source)
    new = transform_block(block, before, after, source)
    z = torch.randn(4, *shape, generator=source)
    labels = torch.arange(4)
    moved = new.transport(z, condition=Condition(labels)).z
    torch.testing.assert_close(moved, block(z), rtol=1e-5, atol=1e-5)
    (moved * torch.linspace(1, 2, moved.numel()).view_as(moved)).sum().backward()
    # something that depends on the class learns
    learns = [n for n, p in new.named_parameters() if p.grad is not None and p.grad.any()]
    assert any("label" in name or "modulation" in name for name in learns)
