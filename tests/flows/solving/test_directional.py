"""Directional derivatives (∂v/∂z) ε of every network, against autograd, and their gradients."""

from __future__ import annotations

import pytest
import torch

from flows.networks.config import VelocityConfig
from flows.networks.mlp import SoftplusJvp
from flows.networks.piecewise import TimeSlice
from flows.networks.registry import KINDS, make_velocity

T = torch.tensor(0.4, dtype=torch.float64)
ACTIVATIONS = ["default", "softplus", "silu", "tanh"]


def build(kind, shape, activation="default"):
    config = VelocityConfig(
        kind, width=8, depth=2, activation=activation, time_features=4, heads=2,
        zero_init=False,
    )  # fmt: skip
    return make_velocity(config, shape, torch.Generator().manual_seed(0)).double()


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def plain(net, z, tangents):
    """v, and its derivatives as exact Jacobians times tangents, differentiable by reverse mode.

    The Jacobian's rows come from reverse passes, so torch's forward mode is not its own judge.
    """
    x = z.detach().requires_grad_()
    v = net(T, x)
    rows = [
        torch.autograd.grad(column.sum(), x, create_graph=True)[0].flatten(1)
        for column in v.flatten(1).unbind(dim=1)
    ]
    jacobian = torch.stack(rows, dim=1)  # samples do not interact
    moved = torch.einsum("bij,nbj->nbi", jacobian, tangents.flatten(2))
    return v, moved.view_as(tangents)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    ("kind", "activation"),
    [*((kind, "default") for kind in KINDS), *(("mlp", name) for name in ACTIVATIONS[1:])],
)
def test_value_derivative_and_gradient(kind, activation, n):
    net = build(kind, (2, 4, 2), activation)
    z, tangents = draw(5, 2, 4, 2), draw(n, 5, 2, 4, 2)
    v, moved = net.directional(T, z, tangents)
    v_plain, moved_plain = plain(net, z, tangents)
    torch.testing.assert_close(v, v_plain)
    torch.testing.assert_close(moved, moved_plain)
    parameters = list(net.parameters())
    weights = draw(*v.shape), draw(*moved.shape)
    gradients = [
        torch.autograd.grad(
            (a * weights[0]).sum() + (b * weights[1]).sum(), parameters, allow_unused=True
        )
        for a, b in ((v, moved), (v_plain, moved_plain))
    ]
    for ours, theirs in zip(*gradients, strict=True):
        zeros = torch.zeros(()).double()
        ours, theirs = (zeros if g is None else g for g in (ours, theirs))
        torch.testing.assert_close(ours, theirs + torch.zeros_like(ours))


def test_time_slice_follows_its_inner_field():
    net = build("mlp", (3,))
    part, z, tangents = TimeSlice(net, 0.25, 0.5), draw(4, 3), draw(2, 4, 3)
    v, moved = part.directional(T, z, tangents)
    inner_v, inner_moved = net.directional(0.25 + 0.5 * T, z, tangents)
    torch.testing.assert_close(v, 0.5 * inner_v)
    torch.testing.assert_close(moved, 0.5 * inner_moved)


def test_softplus_pair_is_softplus_far_out_too():
    p = torch.tensor([[-800.0, -90.0, -1.0, 0.0, 1e-3, 30.0, 800.0]])
    q = torch.ones(2, *p.shape)
    for dtype, tolerance in ((torch.float32, 3e-7), (torch.float64, 1e-14)):
        y, r = SoftplusJvp.apply(p.to(dtype), q.to(dtype))
        exact = torch.nn.functional.softplus(p.double())
        torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(r[1].double(), p.double().sigmoid(), rtol=1e-6, atol=1e-30)


def test_softplus_pair_gradient():
    p, q = draw(3, 4).requires_grad_(), draw(2, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(SoftplusJvp.apply, (p, q))
    assert torch.autograd.gradcheck(SoftplusJvp.apply, (p, q[:1]))
