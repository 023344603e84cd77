"""Networks in half precision: what they return, and what stays in float32."""

from __future__ import annotations

import torch
from torch import nn

from flows.autoguidance import Autoguided
from flows.mixed_precision import MixedPrecision, in_mixed_precision
from flows.networks.config import VelocityConfig
from flows.networks.registry import make_velocity
from flows.solving.solver import SolverConfig
from flows.spec import BlockSpec
from tests.flows.problems import fresh_flow

EPS = torch.finfo(torch.bfloat16).eps


def unet(seed=1, **changes):
    config = VelocityConfig(kind="unet", width=8, depth=1, zero_init=False, **changes)
    return make_velocity(config, (3, 4, 4), torch.Generator().manual_seed(seed))


def draw(n=5):
    return torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(7))


def test_the_network_is_evaluated_in_bfloat16_and_returned_in_its_samples_precision():
    net, z, t, labels = unet(classes=2), draw(), torch.tensor(0.3), torch.tensor([0, 1, 2, 0, 1])
    seen = []
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    exact = net(t, z, labels)
    assert set(seen) == {torch.float32}
    seen.clear()
    v = MixedPrecision(net)(t, z, labels)
    assert set(seen) == {torch.bfloat16} and v.dtype == torch.float32
    assert 0 < (v - exact).norm() / exact.norm() < 8 * EPS
    assert next(net.parameters()).dtype == torch.float32


def test_several_networks_may_be_trained_in_bfloat16():
    """Under autocast every network's part comes back in float32, in its own rows."""
    both, z, t = unet(nets=2), draw(4), torch.tensor([0.7, 0.1, 0.3, 0.9])
    exact = both(t, z)
    with torch.autocast("cpu", torch.bfloat16):
        v = both(t, z)
    v.square().sum().backward()
    assert v.dtype == torch.float32
    assert 0 < (v - exact).norm() / exact.norm() < 8 * EPS
    assert all(p.grad is not None for p in both.parameters())


def test_guidance_is_reckoned_in_float32():
    """Else the difference of two fields that are nearly the same would be lost."""
    a, b, z, t = unet(1), unet(2), draw(), torch.tensor(0.6)
    v = Autoguided(MixedPrecision(a), MixedPrecision(b), 3.0)(t, z)
    ours, theirs = MixedPrecision(a)(t, z), MixedPrecision(b)(t, z)
    torch.testing.assert_close(v, theirs + 3 * (ours - theirs), rtol=1e-6, atol=1e-6)
    assert not torch.equal(v, v.bfloat16().float())


def test_a_flow_in_half_precision_shares_its_weights_and_meets_the_jumps():
    config = VelocityConfig(kind="unet", width=8, depth=1, nets=2, zero_init=False)
    specs = [BlockSpec(config, SolverConfig("midpoint", 2))] * 2
    flow, z = fresh_flow((3, 4, 4), specs, seed=3), draw()
    halved = in_mixed_precision(flow)
    assert [len(block.velocity.smooth_pieces()) for block in halved] == [2, 2]
    assert {p.data_ptr() for p in halved.parameters()} == {p.data_ptr() for p in flow.parameters()}
    exact, actual = flow.decode(z), halved.decode(z)
    assert actual.dtype == torch.float32 and not torch.equal(actual, exact)
    # the error is that of the networks, which stays small against what the blocks move
    assert (actual - exact).norm() < 16 * EPS * (exact - z).norm()
    torch.testing.assert_close(flow.decode(z), exact, rtol=0, atol=0)
