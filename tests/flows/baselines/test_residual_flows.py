"""i-ResNet and IGNN against closed forms, full Jacobians and known limits."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from flows.baselines.ignn import Ignn, IgnnConfig
from flows.baselines.iresnet import IResNet, IResNetConfig, SpectralLinear, series_log_det
from flows.baselines.residual import FixedPoint, InvertibleBlock
from flows.errors import FlowError
from flows.likelihood import log_normal
from flows.networks.config import VelocityConfig
from tests.flows.baselines.models import (
    CONFIGS,
    MATRIX,
    gaussian_log_prob,
    linear,
    model_of,
    normal,
    rng,
)


def test_iresnet_and_ignn_of_linear_branches_are_gaussians() -> None:
    branch = VelocityConfig("linear")
    ignn = Ignn(IgnnConfig(branch, 1), 2).double()
    linear(MATRIX, ignn.layers[0].branch.affine)
    iresnet = IResNet(IResNetConfig(depth=0, blocks=1), 2).double()
    layer = iresnet.layers[0].branch.layers[0]
    linear(MATRIX, layer)
    layer.iterate(50)
    total, z = torch.eye(2) + MATRIX, normal(6)
    expected = gaussian_log_prob(z, torch.linalg.inv(total.T @ total))
    for model in (ignn, iresnet):
        torch.testing.assert_close(model.log_prob(z).value, expected)


def test_the_spectral_bound_holds_after_training_steps() -> None:
    model = IResNet(IResNetConfig(width=32, depth=2, blocks=2), 2, rng(1))
    optimizer = torch.optim.Adam(model.parameters(), 3e-2)
    for step in range(15):
        optimizer.zero_grad()
        model.loss(4 * normal(32).float(), rng(step)).backward()
        optimizer.step()
    for layer in model.layers:
        bound = 1.0
        for linear_ in layer.branch.layers:
            linear_.iterate(5)
            weight = linear_.weight.detach()
            norm = float(torch.linalg.matrix_norm(weight, 2))
            estimate = float(linear_.left @ weight @ linear_.right)
            bound *= min(norm, norm * linear_.bound / estimate)
        assert bound <= 0.9 * 1.02
    layers = [m for m in model.modules() if isinstance(m, SpectralLinear)]
    assert any(float(torch.linalg.matrix_norm(m.weight.detach(), 2)) > m.bound for m in layers)


def test_the_power_series_converges_to_the_log_determinant() -> None:
    model = model_of("iresnet")
    layer, z = model.layers[0], normal(40)
    u = layer.prepare(z)
    exact = layer.with_log_det(z)[1] - layer.affine_log_det()
    probes = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 2)
    errors = []
    for terms in (2, 6, 40):
        # the mean over all Rademacher probes is the exact trace
        total = sum(series_log_det(layer, u, eps.expand(40, 2), [1.0] * terms)[1]
                    for eps in probes) / 4  # fmt: skip
        errors.append(float((total - exact).abs().max()))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-4


def test_the_roulette_is_unbiased() -> None:
    config = dataclasses.replace(CONFIGS["iresnet"], estimator="roulette", terms=2)
    model = IResNet(config, 2)
    drawn = [model.series_weights(rng(seed)) for seed in range(4000)]
    for order in range(2, 6):  # E[w_k] = 1 for every term
        mean = sum(w[order] if len(w) > order else 0 for w in drawn) / len(drawn)
        assert mean == pytest.approx(1, abs=0.25)
    assert all(w[:2] == [1.0, 1.0] for w in drawn)


def test_an_inverse_that_fails_is_counted() -> None:
    model = Ignn(IgnnConfig(VelocityConfig("linear"), 1, fixed_point=FixedPoint(1e-6, 60)), 2)
    linear(torch.diag(torch.tensor([0.5, -1.5])), model.layers[0].branch.affine)
    noise = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    decoded = model.decode_checked(noise)
    assert decoded.converged.tolist() == [True, False, False] and decoded.failures == 2
    torch.testing.assert_close(decoded.z[0], torch.tensor([1 / 1.5, 0.0]))
    assert model.folded(noise).tolist() == [True] * 3  # det(I + W) = 1.5 · (−0.5)
    with pytest.raises(FlowError, match="2 of 3 samples did not converge"):
        model.decode(noise)


def test_the_transport_cost_counts_movements() -> None:
    config = IgnnConfig(VelocityConfig("linear"), 2, transport=0.3)
    model = Ignn(config, 2).double()
    for layer in model.layers:
        linear(MATRIX, layer.branch.affine)
    z = normal(7)
    middle = z @ (torch.eye(2) + MATRIX).T
    end = middle @ (torch.eye(2) + MATRIX).T
    movement = (middle - z).square().sum(1) + (end - middle).square().sum(1)
    log_det = 2 * torch.linalg.slogdet(torch.eye(2) + MATRIX)[1]
    expected = (0.3 * movement - log_normal(end) - log_det).mean()
    torch.testing.assert_close(model.loss(z), expected)


def test_the_gradient_of_ignn_is_that_of_its_loss() -> None:
    """The default network has a chain rule of its own, whose derivative training takes."""
    config = IgnnConfig(VelocityConfig("mlp", 6, 2, autonomous=True, zero_init=False), 2)
    model, z = Ignn(config, 2, rng(1)).double(), normal(5)
    model.loss(z).backward()
    for parameter in model.parameters():
        direction = torch.randn(parameter.shape, generator=rng(2), dtype=torch.float64)
        assert parameter.grad is not None
        expected = float((parameter.grad * direction).sum())
        with torch.no_grad():
            parameter.add_(1e-5 * direction)
            high = float(model.loss(z))
            parameter.sub_(2e-5 * direction)
            low = float(model.loss(z))
            parameter.add_(1e-5 * direction)
        assert (high - low) / 2e-5 == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_affine_maps_start_standardised_once() -> None:
    model = IResNet(IResNetConfig(width=4, blocks=1), 2)
    layer = model.layers[0]
    assert isinstance(layer, InvertibleBlock) and layer.affine is not None
    data = 3 * normal(100).float() + 5
    layer.affine.initialise(data)
    start = layer.affine(data)
    torch.testing.assert_close(start.mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(start.std(0), torch.ones(2))
    layer.affine.initialise(data * 2)
    torch.testing.assert_close(layer.affine(data), start)
    torch.testing.assert_close(layer.affine.inverse(start), data)
