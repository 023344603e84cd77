"""FFJORD, OT-Flow and ScoreSDE against closed forms and integrals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flows.baselines.ffjord import Ffjord, FfjordConfig, RunningCosts
from flows.baselines.otflow import OtFlow, OtFlowConfig, PotentialCosts
from flows.baselines.score_sde import ScoreSde, ScoreSdeConfig
from flows.likelihood import log_normal
from flows.networks.base import Velocity
from flows.networks.config import VelocityConfig
from flows.solving.estimators import Exact
from flows.solving.solver import SolverConfig
from tests.flows.baselines.models import MATRIX, gaussian_log_prob, linear, normal, rng


def test_ffjord_of_a_linear_field_is_a_gaussian() -> None:
    model = Ffjord(FfjordConfig(VelocityConfig("linear"), blocks=2), 2).double()
    for block, matrix in zip(model.flow, (MATRIX, MATRIX.T), strict=True):
        linear(matrix, block.velocity.affine)
    model.solver = SolverConfig(method="dopri5", rtol=1e-9, atol=1e-9)
    total = torch.matrix_exp(MATRIX.T) @ torch.matrix_exp(MATRIX)
    covariance = torch.linalg.inv(total.T @ total)
    z = normal(6)
    expected = gaussian_log_prob(z, covariance)
    torch.testing.assert_close(model.log_prob(z).value, expected, rtol=1e-6, atol=1e-6)


def test_the_running_costs_are_the_integrals() -> None:
    """v = A z with a symmetric A: ‖A‖_F² in the mean over the four probes, and ∫‖A z‖² dt."""
    config = FfjordConfig(VelocityConfig("linear"), kinetic=0.7, jacobian=0.2)
    model = Ffjord(config, 2).double()
    matrix = torch.tensor([[0.5, 0.2], [0.2, -0.4]], dtype=torch.float64)
    linear(matrix, model.flow[0].velocity.affine)
    z, costs = normal(5), RunningCosts()
    probes = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 2)
    moved = [
        model.flow[0].transport(z, divergence=costs, eps=eps.expand(1, 5, 2)) for eps in probes
    ]
    log_det = torch.stack([each.log_det for each in moved]).mean(dim=0)
    kinetic, jacobian = torch.stack([each.costs for each in moved]).mean(dim=0)
    torch.testing.assert_close(log_det, matrix.trace().expand(5))
    torch.testing.assert_close(jacobian, matrix.square().sum().expand(5))
    # ∫ zᵀ e^{tA} A² e^{tA} z dt = zᵀ A (e^{2A} − I) z / 2
    integral = matrix @ (torch.matrix_exp(2 * matrix) - torch.eye(2)) / 2
    torch.testing.assert_close(kinetic, (z @ integral * z).sum(dim=1), rtol=1e-4, atol=1e-5)
    end = z @ torch.matrix_exp(matrix).T
    nll = (-log_normal(end) - matrix.trace() + 0.7 * kinetic).mean()
    eps = costs.draw_probe(z, rng(5))
    drawn = model.flow[0].transport(z, divergence=costs, eps=eps)
    expected = nll + (matrix.trace() - drawn.log_det + 0.2 * drawn.costs[1]).mean()
    torch.testing.assert_close(model.loss(z, rng(5)), expected, rtol=1e-4, atol=1e-4)


def test_otflow_of_a_quadratic_potential_is_a_gaussian() -> None:
    model = OtFlow(OtFlowConfig(width=4, rank=3), 2).double()
    velocity = model.flow[0].velocity
    root = torch.tensor([[0.5, 0.2, 0.0], [0.0, 0.4, 0.0]], dtype=torch.float64)
    with torch.no_grad():
        velocity.weight.zero_()
        velocity.low_rank.zero_()
        velocity.low_rank[:2] = root
    model.solver = SolverConfig(method="dopri5", rtol=1e-9, atol=1e-9)
    hessian = (root.T @ root)[:2, :2]
    total = torch.matrix_exp(-hessian)
    z = normal(6)
    expected = gaussian_log_prob(z, torch.linalg.inv(total.T @ total))
    torch.testing.assert_close(model.log_prob(z).value, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_the_potential_has_its_gradient_and_laplacian(depth: int) -> None:
    model = OtFlow(OtFlowConfig(width=7, depth=depth, rank=3), 3, rng(2)).double()
    velocity = model.flow[0].velocity
    torch.nn.init.normal_(velocity.weight, generator=rng(4))
    torch.nn.init.normal_(velocity.linear, generator=rng(5))
    z, t = normal(5, 3).requires_grad_(), torch.tensor(0.3, dtype=torch.float64)
    times = t.expand(5).clone().requires_grad_()
    phi = velocity.potential(times, z).sum()
    by_z, by_t = torch.autograd.grad(phi, (z, times), create_graph=True)
    gradient, laplacian = velocity.derivatives(times, z)
    torch.testing.assert_close(gradient, torch.cat([by_z, by_t[:, None]], dim=1))
    torch.testing.assert_close(velocity(t, z), -by_z)
    trace = sum(torch.autograd.grad(by_z[:, i].sum(), z, retain_graph=True)[0][:, i]
                for i in range(3))  # fmt: skip
    torch.testing.assert_close(laplacian, trace)
    v, rows = PotentialCosts().estimates(velocity, t, z)
    torch.testing.assert_close(rows[0], Exact()(velocity, t, z)[1])
    torch.testing.assert_close(rows[1], by_z.square().sum(1) / 2)
    torch.testing.assert_close(rows[2], (by_t - by_z.square().sum(1) / 2).abs())
    torch.testing.assert_close(v, -by_z)


class GaussianScore(Velocity):
    """The exact noise predictor of N(0, Σ), times a factor: σ (a² Σ + σ² I)⁻¹ z."""

    def __init__(self, config: ScoreSdeConfig, covariance: Tensor, factor: float = 1.0) -> None:
        super().__init__((len(covariance),))
        self.config, self.factor = config, factor
        self.values, self.axes = torch.linalg.eigh(covariance)

    def forward(self, t: Tensor, z: Tensor, labels: Tensor | None = None) -> Tensor:
        a, sigma = (part[..., None] for part in self.config.marginal(t))
        ratio = sigma / (a**2 * self.values + sigma**2)
        return self.factor * ((z @ self.axes) * ratio) @ self.axes.T


def test_scoresde_with_the_exact_score_is_the_gaussian() -> None:
    config = ScoreSdeConfig(start=1e-4)
    covariance = torch.tensor([[1.5, 0.6], [0.6, 0.5]], dtype=torch.float64)
    model = ScoreSde(config, 2).double()
    model.flow[0].velocity.network = GaussianScore(config, covariance)
    z = normal(6)
    expected = gaussian_log_prob(z, covariance)
    torch.testing.assert_close(model.log_prob(z).value, expected, rtol=0, atol=2e-3)


def test_the_exact_score_minimises_the_denoising_loss() -> None:
    config = ScoreSdeConfig()
    covariance = torch.tensor([[1.5, 0.6], [0.6, 0.5]], dtype=torch.float64)
    model = ScoreSde(config, 2).double()
    z = normal(4000) @ torch.linalg.cholesky(covariance).T
    losses = []
    for factor in (0.9, 1.0, 1.1):
        model.flow[0].velocity.network = GaussianScore(config, covariance, factor)
        losses.append(float(model.loss(z, rng(7))))
    assert losses[1] < min(losses[0], losses[2])
