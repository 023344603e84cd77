"""UNets of any number of levels, against the plain recursion, and the levels of a number."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from flows.errors import FlowError
from flows.freezing import freeze
from flows.networks.config import VelocityConfig
from flows.networks.convnet import UNetVelocity
from flows.networks.registry import make_velocity
from flows.solving.estimators import Exact, Hutchinson
from flows.spec import BlockSpec

CONFIG = VelocityConfig("unet", (8, 16, 8), 2, heads=2, classes=3, time_features=8)
SHAPE = (2, 16, 8)


def build(shape: tuple[int, ...] = SHAPE, **changes) -> UNetVelocity:
    """A network in float64, none of whose weights are zero."""
    config = replace(CONFIG, **changes)
    network = make_velocity(config, shape, torch.Generator().manual_seed(0)).double()
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=source).double()
    assert isinstance(network, UNetVelocity)
    return network


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).double()


def descend(network: UNetVelocity, parts: list, hidden: Tensor, embedding: Tensor) -> Tensor:
    """The network below some level: down, the levels below, up, joined with the skip."""
    if not parts:
        for block in network.middle:
            hidden = block(hidden, embedding)
        return network.middle_out[0](network.attention(hidden), embedding)
    for block in parts[0].encoder:
        hidden = block(hidden, embedding)
    skip = parts[0].mix_in(hidden)
    below = descend(network, parts[1:], parts[0].down(skip), embedding)
    below = below.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    hidden = torch.cat([parts[0].up(below), skip], 1)
    for block in parts[0].decoder:
        hidden = block(hidden, embedding)
    return parts[0].mix_out(hidden)


def test_levels_are_nested() -> None:
    network, z, labels = build(), draw(4, *SHAPE), torch.arange(4)
    t = torch.linspace(0, 1, 4).double()
    embedding = F.silu(network.time(network.features(t, labels)))
    parts = [network, *network.levels]
    assert len(parts) == 2
    hidden = descend(network, parts, network.input(z), embedding)
    expected = network.output(F.silu(network.norm(hidden)))
    torch.testing.assert_close(network(t, z, labels), expected)


def test_a_list_of_two_is_the_network_of_a_number() -> None:
    number, both = build(width=8), build(width=(8, 16))
    assert list(number.state_dict()) == list(both.state_dict())
    z, t, labels = draw(4, *SHAPE), torch.tensor(0.3).double(), torch.arange(4)
    assert torch.equal(number(t, z, labels), both(t, z, labels))
    # an odd side leaves a number one level, which a list says by itself
    odd = (2, 7, 7)
    one, single = build(odd, width=8), build(odd, width=(8,))
    z = draw(4, *odd)
    assert torch.equal(one(t, z, labels), single(t, z, labels))


@pytest.mark.parametrize("side", [8, 16, 32])
def test_levels_attend_where_the_grid_is_small_and_at_the_bottom(side: int) -> None:
    network = build((2, side, side), width=(8, 8, 8))
    kept = {name.rsplit(".qkv", 1)[0] for name, _ in network.named_parameters() if "qkv" in name}
    expected = {"attention"}
    if side <= 16:
        expected |= {"levels.0.mix_in", "levels.0.mix_out"}
    if side <= 8:
        expected |= {"mix_in", "mix_out"}
    assert kept == expected
    assert not any("qkv" in name for name, _ in build(width=(8, 8, 8), heads=0).named_parameters())


def test_every_weight_takes_part_and_samples_do_not_interact() -> None:
    network, z, labels = build(depth=1), draw(3, *SHAPE), torch.tensor([0, 1, 3])
    times = torch.tensor([0.1, 0.5, 0.9]).double()
    together = network(times, z, labels)
    for k in range(3):
        alone = network(times[k], z[k : k + 1], labels[k : k + 1])
        torch.testing.assert_close(together[k : k + 1], alone)
    together.square().sum().backward()
    assert all(float(p.grad.abs().max()) > 0 for p in network.parameters() if p.dim() > 1)


def test_directional_derivatives_and_divergence() -> None:
    network = build((1, 8, 4), width=(4, 4, 8), depth=1, classes=0, heads=1)
    z, t = draw(2, 1, 8, 4), torch.tensor(0.4).double()
    _, exact = Exact()(network, t, z)
    jacobian = torch.autograd.functional.jacobian(lambda x: network(t, x).sum(0), z)
    trace = jacobian.view(32, 2, 32).diagonal(dim1=0, dim2=2).sum(-1)
    torch.testing.assert_close(exact, trace)
    eps = torch.eye(32).double().view(32, 1, 1, 8, 4).expand(32, 2, 1, 8, 4)
    estimates = Hutchinson(probes=32).estimates(network, t, z, eps)[1]
    torch.testing.assert_close(estimates.sum(0), trace)


@pytest.mark.parametrize("classes", [0, 3])
def test_a_frozen_network_is_the_field_at_its_time(classes: int) -> None:
    network = build(classes=classes)
    frozen = make_velocity(replace(CONFIG, classes=classes, autonomous=True), SHAPE).double()
    frozen.load_state_dict(freeze(network, 0.3, 0.25))
    z, labels = draw(4, *SHAPE), (torch.arange(4),) if classes else ()
    expected = 0.25 * network(torch.tensor(0.3).double(), z, *labels)
    torch.testing.assert_close(frozen(torch.tensor(0.9).double(), z, *labels), expected)


def test_levels_survive_json() -> None:
    spec = BlockSpec(CONFIG)
    again = BlockSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec and again.velocity.width == (8, 16, 8)


@pytest.mark.parametrize(
    ("changes", "shape", "words"),
    [
        ({}, (2, 6, 8), "velocity.width has 3 levels on a grid of 6x8; .* multiples of 4"),
        ({"patch": 2}, (2, 12, 12), "3 levels on a grid of 6x6"),
        ({"heads": 3}, SHAPE, "velocity.width gives 16 channels .* 3 attention heads"),
        ({"width": ()}, SHAPE, "velocity.width is .. for the kind unet"),
        ({"width": (8,) * 13}, SHAPE, "a list of 1 to 12 levels"),
        ({"width": (8, 0)}, SHAPE, "velocity.width must be at least 1, not 0"),
        ({"width": (8, 1.5)}, SHAPE, "velocity.width must be an integer, not 1.5"),
        ({"kind": "conv"}, SHAPE, "velocity.width is .8, 16, 8. for the kind conv"),
    ],
)
def test_levels_that_do_not_fit_are_one_sentence(changes, shape, words) -> None:
    with pytest.raises(FlowError, match=words):
        make_velocity(replace(CONFIG, **changes), shape)
