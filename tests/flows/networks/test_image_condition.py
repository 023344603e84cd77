"""Image conditioning: what the network sees, what it learns, and mistakes."""

from __future__ import annotations

import pytest
import torch

from flows.block import Block
from flows.errors import FlowError
from flows.mixed_precision import in_mixed_precision
from flows.networks.condition import Condition
from flows.networks.config import VelocityConfig
from flows.networks.image_condition import ImageConditionedNetwork
from flows.networks.registry import make_velocity
from flows.solving.solver import SolverConfig
from flows.spec import BlockSpec
from tests.flows.problems import fresh_flow, rebuilt, regression

MIDPOINT = SolverConfig("midpoint", steps=4)


def config(kind="unet", **changes):
    sizes = {"width": 8, "depth": 1, "heads": 0, "image_channels": 2, "zero_init": False}
    return VelocityConfig(kind=kind, **sizes | changes)


def network(seed=1, **changes):
    return make_velocity(config(**changes), (3, 4, 4), torch.Generator().manual_seed(seed))


def draw(n, channels, seed=7):
    return torch.randn(n, channels, 4, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["unet", "conv", "dit"])
def test_the_network_sees_samples_and_images_side_by_side(kind):
    net = network(kind=kind, heads=2 if kind == "dit" else 0)
    z, c, t = draw(5, 3), draw(5, 2, 8), torch.tensor(0.3)
    assert isinstance(net, ImageConditionedNetwork) and net.shape == (3, 4, 4) and net.dim == 48
    field = net.with_image(c)
    v = field(t, z)
    assert torch.equal(v, net.inner(t, torch.cat([z, c], 1))[:, :3])
    assert v.shape == z.shape and not torch.allclose(v, net.with_image(c + 1)(t, z))
    # row i depends on row i alone, and several copies of the samples have the same images
    changed = c.clone()
    changed[3] += 1
    other = net.with_image(changed)(t, z)
    assert [torch.equal(a, b) for a, b in zip(v, other, strict=True)] == [True] * 3 + [False, True]
    torch.testing.assert_close(field(t, torch.cat([z, z])), torch.cat([v, v]))


def test_a_flow_is_cut_into_chunks_with_its_images():
    flow = fresh_flow((3, 4, 4), [BlockSpec(config(), MIDPOINT, objective="lfm")])
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(3))
    z, c = draw(7, 3), draw(7, 2, 8)
    whole = flow.decode(z, condition=Condition(image=c))
    parts = flow.decode(z, condition=Condition(image=c), chunk=3)
    torch.testing.assert_close(whole, parts)
    there = flow.encode(whole, condition=Condition(image=c))
    torch.testing.assert_close(there, z, rtol=0, atol=0.05)
    again = rebuilt(flow).float()
    assert again.specs == flow.specs and isinstance(again[0].velocity, ImageConditionedNetwork)
    assert torch.equal(again.decode(z, condition=Condition(image=c)), whole)
    half = in_mixed_precision(flow).decode(z, condition=Condition(image=c))
    assert 0 < (half - whole).norm() / whole.norm() < 0.1


def test_classes_and_images_go_together():
    block = Block(network(classes=3), MIDPOINT)
    z, c, labels = draw(4, 3), draw(4, 2, 8), torch.tensor([0, 1, 2, 3])
    moved = block.transport(z, condition=Condition(labels, image=c)).z
    bound = Block(block.velocity.with_image(c), MIDPOINT)
    assert torch.equal(moved, bound.transport(z, condition=Condition(labels)).z)
    with pytest.raises(FlowError, match="trained with 3 classes"):
        block.transport(z, condition=Condition(image=c))


@pytest.mark.slow
def test_a_network_learns_to_depend_on_its_images():
    """The samples are the images plus noise, and the trained flow returns them."""
    one = config(image_channels=1, width=16)
    net = make_velocity(one, (1, 4, 4), torch.Generator().manual_seed(0))
    optimizer, drawn = torch.optim.Adam(net.parameters(), 1e-2), torch.Generator().manual_seed(1)
    for _ in range(400):
        c = torch.randn(64, 1, 4, 4, generator=drawn)
        z = c + 0.1 * torch.randn(c.shape, generator=drawn)
        loss = regression(net.with_image(c), z, None, drawn)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    c = torch.randn(200, 1, 4, 4, generator=drawn)
    noise = torch.randn(c.shape, generator=drawn)
    with torch.no_grad():
        moved = Block(net, SolverConfig("midpoint", steps=8)).transport(
            noise, reverse=True, condition=Condition(image=c)
        )
    assert (moved.z - c).std() < 0.3
    correlation = torch.corrcoef(torch.stack([moved.z.flatten(), c.flatten()]))[0, 1]
    assert correlation > 0.95


def test_mistakes():
    net, z, c = network(), draw(4, 3), draw(4, 2)
    plain = make_velocity(VelocityConfig("conv", width=8, depth=1), (3, 4, 4))
    with pytest.raises(FlowError, match=r"pass Condition\(image=…\) of shape \(B, 2, 4, 4\)"):
        net(torch.tensor(0.5), z)
    with pytest.raises(FlowError, match=r"pass Condition\(image=…\) of shape \(B, 2, 4, 4\)"):
        Block(net, MIDPOINT)(z)
    with pytest.raises(FlowError, match="not conditioned on an image"):
        Block(plain, MIDPOINT)(z, Condition(image=c))
    with pytest.raises(FlowError, match=r"expected images of shape \(2, 4, 4\)"):
        net.with_image(draw(4, 3))
    with pytest.raises(FlowError, match="one conditioning image for each of 4 samples, found 3"):
        Block(net, MIDPOINT)(z, Condition(image=c[:3]))
    with pytest.raises(FlowError, match="guidance is 2.0 without labels"):
        Condition(image=c, guidance=2.0)
    with pytest.raises(FlowError, match="needs labels, images"):
        Condition()
    with pytest.raises(FlowError, match=r"velocity\.image_channels is 2 for 2 network"):
        config(nets=2)
    with pytest.raises(FlowError, match=r"1 network\(s\) of kind resmlp; .* a single conv, unet"):
        config(kind="resmlp")
    with pytest.raises(FlowError, match=r"velocity\.image_channels must be at least 0"):
        config(image_channels=-1)
    with pytest.raises(FlowError, match=r"needs samples of shape \(C, H, W\)"):
        make_velocity(config(kind="conv"), (12,))
