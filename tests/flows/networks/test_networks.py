"""Networks: identity at birth, shared and individual times agree, samples do not interact."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flows.errors import FlowError
from flows.networks.config import VelocityConfig
from flows.networks.layers import ContextFeatures
from flows.networks.piecewise import TimeSlice
from flows.networks.registry import KINDS, make_velocity
from flows.solving.estimators import Exact
from tests.flows.problems import Breathing, points

SMALL = VelocityConfig(width=8, depth=2, time_features=4, heads=2)
SHAPES = {
    "conv": [(2, 4, 4), (1, 5, 3)],
    "unet": [(2, 4, 4), (3, 7, 7)],
    "dit": [(2, 4, 4), (1, 5, 3)],
}


def cases():
    return [(kind, shape) for kind in KINDS for shape in SHAPES.get(kind, [(5,), (2, 3, 3)])]


def build(kind, shape, **changes):
    config = replace(SMALL, kind=kind, **changes)
    return make_velocity(config, shape, torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize(("kind", "shape"), cases())
def test_new_network_is_the_zero_field(kind, shape):
    net = build(kind, shape)
    z = points(net)
    out = net(torch.tensor(0.5, dtype=torch.float64), z)
    assert torch.equal(out, torch.zeros_like(z))


@pytest.mark.parametrize(("kind", "shape"), cases())
def test_individual_times_agree_with_the_shared_time_and_samples_do_not_interact(kind, shape):
    net = build(kind, shape, zero_init=False)
    _wake_modulations(net)
    z = points(net, batch=4)
    times = torch.tensor([0.0, 0.3, 0.7, 1.0], dtype=torch.float64)
    together = net(times, z)
    alone = torch.cat([net(time, z[k : k + 1]) for k, time in enumerate(times)])
    torch.testing.assert_close(together, alone)
    if kind != "linear":
        assert not torch.allclose(net(times[0], z), net(times[3], z))


def _wake_modulations(net):
    """Gives the zero-initialised time modulations some weight."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "modulation" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)


@pytest.mark.parametrize("kind", KINDS)
def test_initial_weights_come_from_the_generator(kind):
    shape = SHAPES.get(kind, [(5,)])[0]
    config = replace(SMALL, kind=kind, zero_init=False)
    state = torch.random.get_rng_state()
    first, again, other = (
        make_velocity(config, shape, torch.Generator().manual_seed(s)).state_dict()
        for s in (3, 3, 4)
    )
    assert torch.equal(torch.random.get_rng_state(), state)  # the global state is untouched
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_mlp_is_the_plain_network_on_z_and_t():
    net = build("mlp", (3,), zero_init=False)
    z = points(net)
    hidden = torch.cat([z, torch.full((len(z), 1), 0.4, dtype=z.dtype)], dim=1)
    for layer in (net.first, *net.middle):
        hidden = torch.nn.functional.softplus(layer(hidden), beta=20)
    out = net(torch.tensor(0.4, dtype=z.dtype), z)
    torch.testing.assert_close(out, net.last(hidden))


def test_residual_mlp_field_can_grow_linearly():
    """No normalisation on the stream: far out v is affine along a ray, as for a Gaussian."""
    net = build("resmlp", (3,), zero_init=False)
    ray = torch.randn(1, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    far = torch.stack([net(torch.tensor(0.0), k * 1e4 * ray) for k in (1.0, 2.0, 3.0)])
    torch.testing.assert_close(far[2] - far[1], far[1] - far[0], rtol=1e-3, atol=1e-3)
    assert (far[1] - far[0]).norm() > 100


def test_time_slice_rescales_time_and_speed():
    field = Breathing()
    z = points(field)
    part = TimeSlice(field, 0.25, 0.5)
    time = torch.tensor(0.6, dtype=z.dtype)
    torch.testing.assert_close(part(time, z), 0.5 * field(0.25 + 0.5 * time, z))
    with pytest.raises(FlowError, match="inside"):
        TimeSlice(field, 0.75, 0.5)


def test_time_features_make_at_most_one_period():
    features = ContextFeatures(VelocityConfig(time_features=6))
    assert features.omega.tolist() == pytest.approx([1.5708, 3.1416, 6.2832], rel=1e-4)
    assert features(torch.tensor(0.0)).flatten().tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: make_velocity(VelocityConfig("transformer"), (2,)), "unknown velocity"),
        (lambda: make_velocity(VelocityConfig("unet"), (4,)), r"\(C, H, W\), found \(4,\)"),
        (lambda: make_velocity(VelocityConfig("conv"), (4,)), r"\(C, H, W\), found \(4,\)"),
        (lambda: make_velocity(VelocityConfig(), ()), "positive sizes"),
        (lambda: make_velocity(VelocityConfig("unet", width=3), (1, 4, 4)), "4 attention heads"),
        (lambda: make_velocity(VelocityConfig("unet", width=6), (1, 8, 8)), "gives 6 channels"),
        (lambda: make_velocity(VelocityConfig("unet", patch=2), (1, 7, 8)), "grid of 7x8"),
        (lambda: VelocityConfig(width=0), "width must be at least 1"),
        (lambda: VelocityConfig(patch=0), "patch must be at least 1"),
        (lambda: VelocityConfig(depth=-1), "depth must be at least 1"),
        (lambda: VelocityConfig(activation="step"), "unknown activation 'step'"),
        (lambda: VelocityConfig(time_features=3), "even"),
        (lambda: VelocityConfig(heads=-1), "heads must be at least 0"),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(FlowError, match=words):
        call()


@pytest.mark.parametrize(("side", "everywhere"), [(8, True), (16, False)])
def test_a_unet_attends_on_small_grids(side: int, everywhere: bool) -> None:
    width = 8 if everywhere else 6  # which 4 heads do not divide
    net = make_velocity(VelocityConfig("unet", width=width, depth=1), (1, side, side))
    kept = {name.split(".")[0] for name, _ in net.named_parameters()}
    assert "attention" in kept
    assert ({"mix_in", "mix_out"} <= kept) == everywhere
    without = make_velocity(VelocityConfig("unet", width=6, depth=1, heads=0), (1, side, side))
    assert not any("mix" in name for name, _ in without.named_parameters())


def test_a_patch_folds_positions_into_channels():
    """The same field as that of the network of the folded grid, divergence and all."""
    folded = build("unet", (8, 2, 2), zero_init=False)
    net = build("unet", (2, 4, 4), patch=2, zero_init=False)
    net.load_state_dict(folded.state_dict())
    z = points(net)
    t = torch.tensor(0.3, dtype=torch.float64)
    fold, unfold = torch.nn.PixelUnshuffle(2), torch.nn.PixelShuffle(2)
    torch.testing.assert_close(net(t, z), unfold(folded(t, fold(z))))
    exact = Exact()
    (field, divergence), (other, expected) = exact(net, t, z), exact(folded, t, fold(z))
    torch.testing.assert_close(field, unfold(other))
    torch.testing.assert_close(divergence, expected)
