"""A field told an image beside its samples: what it sees, what it learns, mistakes."""

from __future__ import annotations

import pytest
import torch

from flows.block import Block, SolverConfig
from flows.errors import FlowError
from flows.flow import BlockSpec, Flow
from flows.mixed_precision import in_half
from flows.networks.condition import Condition
from flows.networks.image_condition import Beside
from flows.networks.registry import VelocityConfig, make_velocity
from flows.objectives.losses import lfm_loss

MIDPOINT = SolverConfig("midpoint", steps=4)


def config(kind="unet", **changes):
    sizes = {"width": 8, "depth": 1, "heads": 0, "beside": 2, "zero_init": False}
    return VelocityConfig(kind=kind, **sizes | changes)


def network(seed=1, **changes):
    return make_velocity(config(**changes), (3, 4, 4), torch.Generator().manual_seed(seed))


def draw(n, channels, seed=7):
    return torch.randn(n, channels, 4, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["unet", "conv"])
def test_the_network_sees_samples_and_images_side_by_side(kind):
    net, z, c, t = network(kind=kind), draw(5, 3), draw(5, 2, 8), torch.tensor(0.3)
    assert isinstance(net, Beside) and net.shape == (3, 4, 4) and net.dim == 48
    field = net.told(c)
    v = field(t, z)
    assert torch.equal(v, net.inner(t, torch.cat([z, c], 1))[:, :3])
    assert v.shape == z.shape and not torch.allclose(v, net.told(c + 1)(t, z))
    # row i depends on row i alone, and several copies of the samples have the same images
    changed = c.clone()
    changed[3] += 1
    other = net.told(changed)(t, z)
    assert [torch.equal(a, b) for a, b in zip(v, other, strict=True)] == [True] * 3 + [False, True]
    torch.testing.assert_close(field(t, torch.cat([z, z])), torch.cat([v, v]))


def test_a_flow_is_cut_into_chunks_with_its_images():
    flow = Flow((3, 4, 4))
    flow.append(BlockSpec(config(), MIDPOINT, objective="lfm"))
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(3))
    z, c = draw(7, 3), draw(7, 2, 8)
    whole = flow.decode(z, condition=Condition(beside=c))
    parts = flow.decode(z, condition=Condition(beside=c), chunk=3)
    torch.testing.assert_close(whole, parts)
    there = flow.encode(whole, condition=Condition(beside=c))
    torch.testing.assert_close(there, z, rtol=0, atol=0.05)
    again = Flow((3, 4, 4))
    again.append(BlockSpec.from_dict(flow.specs[0].to_dict()))
    assert again.specs == flow.specs and isinstance(again[0].velocity, Beside)
    again.load_state_dict(flow.state_dict())
    assert torch.equal(again.decode(z, condition=Condition(beside=c)), whole)
    half = in_half(flow).decode(z, condition=Condition(beside=c))
    assert 0 < (half - whole).norm() / whole.norm() < 0.1


def test_classes_and_images_go_together():
    block = Block(network(classes=3), MIDPOINT)
    z, c, labels = draw(4, 3), draw(4, 2, 8), torch.tensor([0, 1, 2, 3])
    moved = block.transport(z, condition=Condition(labels, beside=c)).z
    by_hand = Block(block.velocity.told(c), MIDPOINT).transport(z, condition=Condition(labels)).z
    assert torch.equal(moved, by_hand)
    with pytest.raises(FlowError, match="trained with 3 classes"):
        block.transport(z, condition=Condition(beside=c))


def test_it_learns_what_its_images_say():
    """Samples are the image itself, up to noise: told it, the regression comes close to that."""
    net = make_velocity(config(beside=1, width=16), (1, 4, 4), torch.Generator().manual_seed(0))
    optimizer, drawn = torch.optim.Adam(net.parameters(), 1e-2), torch.Generator().manual_seed(1)
    for _ in range(400):
        c = torch.randn(64, 1, 4, 4, generator=drawn)
        z = c + 0.1 * torch.randn(c.shape, generator=drawn)
        loss = lfm_loss(net.told(c), z, None, generator=drawn).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    c = torch.randn(200, 1, 4, 4, generator=drawn)
    noise = torch.randn(c.shape, generator=drawn)
    with torch.no_grad():
        moved = Block(net, SolverConfig("midpoint", steps=8)).transport(
            noise, reverse=True, condition=Condition(beside=c)
        )
    assert (moved.z - c).std() < 0.3
    correlation = torch.corrcoef(torch.stack([moved.z.flatten(), c.flatten()]))[0, 1]
    assert correlation > 0.95


def test_mistakes():
    net, z, c = network(), draw(4, 3), draw(4, 2)
    plain = make_velocity(VelocityConfig("conv", width=8, depth=1), (3, 4, 4))
    with pytest.raises(FlowError, match="told an image beside every sample"):
        net(torch.tensor(0.5), z)
    with pytest.raises(FlowError, match="told an image beside every sample"):
        Block(net, MIDPOINT)(z)
    with pytest.raises(FlowError, match="told no image"):
        Block(plain, MIDPOINT)(z, Condition(beside=c))
    with pytest.raises(FlowError, match=r"expected an image of shape \(2, 4, 4\)"):
        net.told(draw(4, 3))
    with pytest.raises(FlowError, match="expected one image beside every sample, 4, found 3"):
        Block(net, MIDPOINT)(z, Condition(beside=c[:3]))
    with pytest.raises(FlowError, match="guidance 2.0 needs labels"):
        Condition(beside=c, guidance=2.0)
    with pytest.raises(FlowError, match="needs labels, images"):
        Condition()
    with pytest.raises(FlowError, match=r"velocity\.beside = 2 needs one network for grids"):
        config(nets=2)
    with pytest.raises(FlowError, match="not 1 of kind resmlp"):
        config(kind="resmlp")
    with pytest.raises(FlowError, match=r"velocity\.beside must not be negative"):
        config(beside=-1)
    with pytest.raises(FlowError, match=r"needs samples of shape \(C, H, W\)"):
        make_velocity(config(kind="conv"), (12,))
