"""Guides: the field that is followed, against the exact map of linear fields."""

from __future__ import annotations

import itertools

import pytest
import torch

from flows.autoguidance import Autoguided, autoguide
from flows.block import Block
from flows.errors import FlowError
from flows.flow import Flow
from flows.networks.condition import Condition
from flows.networks.config import VelocityConfig
from flows.networks.piecewise import PiecewiseVelocity
from flows.networks.registry import make_velocity
from flows.solving.estimators import Exact
from flows.solving.solver import SolverConfig
from flows.spec import BlockSpec
from tests.flows.problems import Affine, fresh_flow

FINE = SolverConfig("dopri5", rtol=1e-9, atol=1e-9)
LABELS = torch.tensor([0, 2, 1, 0])


def linear(seed, classes=0):
    """A linear network with random weights: z A' + b, or + e_y."""
    config = VelocityConfig(kind="linear", classes=classes, zero_init=False)
    return make_velocity(config, (3,), torch.Generator().manual_seed(seed)).double()


def parts(net, label=None):
    """A and b of a linear network, for a label."""
    offset = net.affine.bias.detach()
    if label is not None:
        offset = offset + net.label.embedding.weight.detach()[label]
    return net.affine.weight.detach(), offset


def draw(seed=5, n=4):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("w", [0.0, 1.0, 2.5])
@pytest.mark.parametrize(("classes", "guide_classes"), [(0, 0), (3, 0), (3, 3), (0, 2)])
def test_samples_follow_the_extrapolated_field(classes, guide_classes, w):
    net, guide, z = linear(1, classes), linear(2, guide_classes), draw()
    of = Condition(LABELS) if classes else None
    block = Block(Autoguided(net, guide, w), FINE)
    moved = block.transport(z, divergence=Exact(), condition=of)
    back = block.transport(moved.z, True, condition=of)
    theirs = parts(guide, guide_classes or None)  # the null label, where there are labels
    for row, label in enumerate(LABELS.tolist()):
        ours = parts(net, label if classes else None)
        exact = Affine(*(torch.lerp(b, a, w) for a, b in zip(ours, theirs, strict=True)))
        one = slice(row, row + 1)
        torch.testing.assert_close(moved.z[one], exact.exact(z[one]), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(
            moved.log_det[one], exact.exact_log_det(z[one]), rtol=1e-6, atol=1e-7
        )
    torch.testing.assert_close(back.z, z, rtol=1e-6, atol=1e-7)


def flow(blocks, seed, **velocity):
    config = VelocityConfig(kind="mlp", width=8, depth=1, zero_init=False, **velocity)
    spec = BlockSpec(config, SolverConfig("rk4", 2))
    return fresh_flow((3,), [spec] * blocks, seed).double()


def test_every_block_is_guided_by_its_own():
    ours, theirs, z = flow(2, 1), flow(2, 2), draw()
    led = autoguide(ours, theirs, 1.5)
    step = z
    for block, other in zip(ours, theirs, strict=True):
        step = Block(Autoguided(block.velocity, other.velocity, 1.5), block.solver)(step)
    torch.testing.assert_close(led.encode(z), step.detach())
    torch.testing.assert_close(autoguide(ours, theirs, 1.0).encode(z), ours.encode(z))
    torch.testing.assert_close(autoguide(ours, theirs, 0.0).encode(z), theirs.encode(z))
    assert {p.data_ptr() for p in ours.parameters()} < {p.data_ptr() for p in led.parameters()}


@pytest.mark.parametrize(("ours", "theirs"), [(2, 1), (1, 2), (2, 3), (3, 3)])
def test_the_field_jumps_where_either_does(ours, theirs):
    """From one jump to the next it is a chain of autoguide blocks of one network each."""
    nets = [linear(seed) for seed in range(ours)]
    guides = [linear(10 + seed) for seed in range(theirs)]
    field = Autoguided(sequence(nets), sequence(guides), 1.7)
    times = sorted({k / ours for k in range(ours + 1)} | {k / theirs for k in range(theirs + 1)})
    assert [piece.start for piece in field.smooth_pieces()] == pytest.approx(times[:-1])
    z = draw()
    moved, step, log_det = Block(field, FINE).transport(z, divergence=Exact()), z, 0.0
    for start, end in itertools.pairwise(times):
        middle = (start + end) / 2
        a, b = parts(nets[int(middle * ours)]), parts(guides[int(middle * theirs)])
        matrix, offset = (torch.lerp(y, x, 1.7) * (end - start) for x, y in zip(a, b, strict=True))
        exact = Affine(matrix, offset)
        step, log_det = exact.exact(step), log_det + exact.exact_log_det(step)
    torch.testing.assert_close(moved.z, step, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(moved.log_det, log_det, rtol=1e-6, atol=1e-7)


def test_the_grid_meets_the_jumps_of_the_guide():
    """Also where it is not that of the flow: three sub-intervals do not meet two networks."""
    ours, theirs, z = flow(1, 1), flow(1, 2, nets=2), draw()
    three = SolverConfig("rk4", 3)
    spec = BlockSpec(ours.specs[0].velocity, three)
    odd = Flow.from_blocks((3,), [(spec, Block(ours[0].velocity, three))])
    four = Block(Autoguided(ours[0].velocity, theirs[0].velocity, 1.5), SolverConfig("rk4", 4))
    torch.testing.assert_close(autoguide(odd, theirs, 1.5).encode(z), four(z).detach())


def sequence(nets):
    return nets[0] if len(nets) == 1 else PiecewiseVelocity(nets)


def test_mistakes():
    with pytest.raises(FlowError, match="the guide has 1 blocks; expected the flow's, 2"):
        autoguide(flow(2, 1), flow(1, 2), 2.0)
    for weight in (-1.0, float("inf"), float("nan")):
        with pytest.raises(FlowError, match="finite and not negative"):
            autoguide(flow(1, 1), flow(1, 2), weight)
    other = fresh_flow((2,), [BlockSpec(VelocityConfig(kind="linear"))]).double()
    with pytest.raises(FlowError, match=r"shape \(2,\); expected the flow's, \(3,\)"):
        autoguide(flow(1, 1), other, 2.0)
