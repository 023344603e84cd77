"""Autonomous fields: why JKO needs them, and that no kind of network sees t.

The log-det of training is a quadrature of ∇·v at the nodes of the solver. For the linear field
v = λ(t) z both the map of a step and the quadrature are known in closed form.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flows.block import Block
from flows.errors import FlowError
from flows.net2net import transform_block
from flows.networks.base import Velocity
from flows.networks.config import VelocityConfig
from flows.networks.registry import KINDS, make_velocity
from flows.objectives.losses import jko_loss
from flows.solving.estimators import Exact
from flows.solving.solver import SolverConfig
from flows.spec import BlockSpec, build_block
from tests.flows.problems import points

SMALL = VelocityConfig(width=8, depth=2, time_features=4, heads=2)
SHAPES = {"conv": (2, 4, 4), "unet": (2, 4, 4), "dit": (2, 4, 4)}
HALF = torch.tensor(0.5, dtype=torch.float64)


class Scaled(Velocity):
    """v(t, z) = λ(t) z, with λ the cubic through given values at t = 0, 1/3, 2/3, 1."""

    def __init__(self, values: Tensor) -> None:
        super().__init__((1,))
        self.values = values

    def forward(self, t: Tensor, z: Tensor, labels: Tensor | None = None) -> Tensor:
        knots = [0.0, 1 / 3, 2 / 3, 1.0]
        basis = [
            math.prod(((t - b) / (a - b) for b in knots if b != a), start=torch.ones_like(t))
            for a in knots
        ]
        return sum(value * weight for value, weight in zip(self.values, basis, strict=True)) * z


@pytest.mark.parametrize("large", [10.0, 100.0, 1e4])
def test_with_time_the_objective_has_no_lower_bound(large):
    """One step of RK4 (3/8 rule): the map is 7/8 z whatever L is; the log-det is (L − 1) / 8."""
    z = torch.randn((16, 1), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    field = Scaled(torch.tensor([-1.0, 0.0, 0.0, large], dtype=torch.float64))
    block = Block(field, SolverConfig("rk4", steps=1))
    torch.testing.assert_close(block(z), 7 / 8 * z)
    loss = jko_loss(block, z, 0.5, Exact())
    assert float(loss.neg_log_det) == pytest.approx(-(large - 1) / 8)
    rest = float(z.square().mean()) * ((7 / 8) ** 2 / 2 + (1 / 8) ** 2)
    assert float(loss.total) == pytest.approx(rest - (large - 1) / 8)


@pytest.mark.parametrize(
    ("method", "steps", "expected"),
    [
        ("rk4", 2, 0.038),
        ("midpoint", 3, 0.312),
        pytest.param("rk4", 3, 0.0108, marks=pytest.mark.slow),
        pytest.param("midpoint", 2, 0.628, marks=pytest.mark.slow),
    ],
)
def test_without_time_the_gain_is_bounded(method, steps, expected):
    """v = λ z on data of standard deviation s = 0.03, one proximal step of h = 0.5.

    On a grid the log-det λ exceeds that of the map, log g = S log R(λ / S), by a gain that grows
    with g. So the least objective on the grid is below that of the exact flow by at least the gain
    at the exact step's growth σ / s, and by at most the gain where the grid has its minimum.
    """
    std, h = 0.03, 0.5
    z = torch.tensor([[-std], [std]], dtype=torch.float64)
    block = Block(make_velocity(VelocityConfig("linear"), (1,)).double())
    block.solver = SolverConfig(method, steps=steps)
    block.requires_grad_(False)
    rates = torch.linspace(0, 8, 801, dtype=torch.float64)
    totals, growths = [], []
    for rate in rates:
        block.velocity.affine.weight.fill_(float(rate))
        loss = jko_loss(block, z, h, Exact())
        assert float(loss.neg_log_det) == pytest.approx(-float(rate))
        totals.append(float(loss.total))
        growths.append(float(block(z)[1, 0]) / std)
    growth = torch.tensor(growths, dtype=torch.float64)
    gain = rates - growth.log()
    exact = (growth * std).square() / 2 - growth.log() + ((growth - 1) * std).square() / (2 * h)
    least, at = exact.min(dim=0)
    on_grid, there = torch.tensor(totals, dtype=torch.float64).min(dim=0)
    assert gain[at] - 1e-9 <= least - on_grid <= gain[there] + 1e-9
    assert float(gain[at]) == pytest.approx(expected, rel=0.02)
    assert float(gain[there]) < 1.3 * expected


def waken(net):
    """Gives every weight that starts at zero some value."""
    drawn = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=drawn) / 8)
    return net


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_no_kind_sees_the_time(kind, classes):
    config = replace(SMALL, kind=kind, classes=classes, autonomous=True, zero_init=False)
    net = waken(make_velocity(config, SHAPES.get(kind, (5,)), torch.Generator().manual_seed(0)))
    net = net.double()
    z = points(net, batch=4)
    given = (torch.tensor([0, 1, 2, 3]),) if classes else ()
    early, late = (net(torch.tensor(t, dtype=torch.float64), z, *given) for t in (0.0, 0.9))
    own = net(torch.tensor([0.0, 0.3, 0.9, 1.0], dtype=torch.float64), z, *given)
    assert torch.equal(early, late) and torch.allclose(early, own, rtol=1e-12)
    if classes:
        other = net(HALF, z, torch.tensor([1, 1, 2, 3]))
        assert not torch.allclose(early[0], other[0]) and torch.allclose(early[1:], other[1:])
    elif kind != "linear":
        assert not [name for name, _ in net.named_parameters() if "time" in name]
        with pytest.raises(FlowError, match="labels"):
            net(HALF, z, torch.tensor([0, 1, 2, 3]))
        timed = make_velocity(replace(config, autonomous=False), net.shape)
        fewer = sum(p.numel() for p in net.parameters())
        assert fewer < sum(p.numel() for p in timed.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_of_an_autonomous_network(kind):
    """By hand or by forward mode, they are those of automatic differentiation."""
    config = replace(SMALL, kind=kind, autonomous=True, zero_init=False)
    net = waken(make_velocity(config, SHAPES.get(kind, (5,)))).double()
    z = points(net, batch=2)
    v, moved = net.directional(HALF, z, torch.ones_like(z)[None])
    expected = torch.func.jvp(lambda x: net(HALF, x), (z,), (torch.ones_like(z),))
    torch.testing.assert_close((v, moved[0]), expected)


@pytest.mark.parametrize("autonomous", [False, True])
def test_a_specification_carries_the_choice(autonomous):
    spec = BlockSpec(replace(SMALL, autonomous=autonomous))
    plain = spec.to_dict()
    assert ("autonomous" in plain["velocity"]) is autonomous
    assert BlockSpec.from_dict(plain) == spec


@pytest.mark.parametrize("kind", ["resmlp", "conv", "unet"])
def test_a_widened_network_is_the_same_field(kind):
    narrow = BlockSpec(replace(SMALL, kind=kind, autonomous=True, zero_init=False))
    wide = replace(narrow, velocity=replace(narrow.velocity, width=16))
    shape, drawn = SHAPES.get(kind, (5,)), torch.Generator().manual_seed(0)
    block = build_block(narrow, shape, drawn)
    z = torch.randn((3, *shape), generator=drawn)
    torch.testing.assert_close(transform_block(block, narrow, wide, drawn)(z), block(z))
