"""Gaussian data: the closed form is the minimiser, and a trained linear flow converges to it."""

from __future__ import annotations

import math

import pytest
import torch

from flows.errors import FlowError
from flows.flow import Flow
from flows.likelihood import log_prob
from flows.networks.config import VelocityConfig
from flows.objectives.losses import jko_loss
from flows.objectives.schedule import step_sizes, stopping_ratio
from flows.solving.estimators import Exact
from flows.solving.solver import SolverConfig
from flows.spec import BlockSpec, build_block
from tests.flows.closed_form import entropy, jko_iterates, jko_scale, jko_step, kl_to_standard

COVARIANCE = torch.tensor([[7.0, 5.0], [5.0, 7.0]], dtype=torch.float64)
MEAN = torch.tensor([1.0, -0.5], dtype=torch.float64)


def gaussian_points(n: int, seed: int = 0) -> torch.Tensor:
    """Samples whose empirical mean and covariance are MEAN and COVARIANCE exactly."""
    noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    noise -= noise.mean(dim=0)
    white = noise @ torch.linalg.inv(torch.linalg.cholesky(noise.T @ noise / n)).T
    return MEAN + white @ torch.linalg.cholesky(COVARIANCE).T


@pytest.mark.parametrize("s", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("h", [0.1, 1.0, 20.0])
def test_scale_minimises_the_one_dimensional_objective(s, h):
    a = jko_scale(torch.tensor(s**2, dtype=torch.float64), h).item()

    def objective(x):
        return x**2 * s**2 / 2 - math.log(x) + (x - 1) ** 2 * s**2 / (2 * h)

    for other in (a * 0.999, a * 1.001, a * 0.5, a * 2):
        assert objective(other) > objective(a)


def test_scale_limits():
    variance = torch.tensor([0.25, 1.0, 9.0], dtype=torch.float64)
    torch.testing.assert_close(jko_scale(variance, 1e9), jko_scale(variance, None))
    torch.testing.assert_close(jko_scale(variance, None), variance.rsqrt())
    small = jko_scale(variance, 1e-7)
    # A step of size h is explicit gradient descent to first order: a = 1 + h (1/s² − 1).
    torch.testing.assert_close((small - 1) / 1e-7, 1 / variance - 1, rtol=1e-5, atol=1e-6)
    assert jko_scale(torch.ones(1), 0.7).item() == pytest.approx(1)


@pytest.mark.parametrize("h", [0.4, None])
def test_step_beats_every_nearby_affine_map(h):
    """The objective over all affine maps A z + b, perturbed in random directions."""
    step = jko_step(MEAN, COVARIANCE, h)

    def objective(matrix, offset):
        mean = matrix @ MEAN + offset
        norm = (matrix @ COVARIANCE @ matrix.T).trace() + mean.square().sum()
        shift = matrix - torch.eye(2, dtype=matrix.dtype)
        moved = (shift @ COVARIANCE @ shift.T).trace() + (mean - MEAN).square().sum()
        penalty = 0 if h is None else moved / (2 * h)
        return (norm / 2 - torch.linalg.slogdet(matrix)[1] + penalty).item()

    offset = step.mean - step.matrix @ MEAN
    least = objective(step.matrix, offset)
    assert least == pytest.approx(step.objective)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        change = torch.randn(2, 2, generator=generator, dtype=torch.float64) * 1e-2
        drift = torch.randn(2, generator=generator, dtype=torch.float64) * 1e-2
        if h is None:  # a rotation does not change the free objective
            change = (change + change.T) / 2 @ step.matrix
        assert objective(step.matrix + change, offset + drift) > least


def test_iterates_decrease_the_kl_and_settle():
    steps = jko_iterates(MEAN, COVARIANCE, [0.5] * 30)
    kls = [kl_to_standard(MEAN, COVARIANCE)]
    kls += [kl_to_standard(step.mean, step.covariance) for step in steps]
    assert all(after < before for before, after in zip(kls, kls[1:], strict=False))
    assert kls[-1] < 1e-6
    for before, after, step in zip(kls, kls[1:], steps, strict=False):
        assert before - after >= step.squared_movement / (2 * 0.5)  # energy dissipation
    ratios = [step.stopping_ratio for step in steps]
    assert ratios[0] > 0.1 > 0.01 > ratios[-1]


def test_entropy_and_kl_against_torch():
    normal = torch.distributions.MultivariateNormal(MEAN, COVARIANCE)
    standard = torch.distributions.MultivariateNormal(
        torch.zeros(2).double(), torch.eye(2).double()
    )
    assert entropy(COVARIANCE) == pytest.approx(normal.entropy().item())
    kl = torch.distributions.kl_divergence(normal, standard).item()
    assert kl_to_standard(MEAN, COVARIANCE) == pytest.approx(kl)


def test_trained_linear_flow_converges_to_the_closed_form_block_by_block():
    """Every block's map, movement and Ter(k); the NLL after the free block is the entropy."""
    z = gaussian_points(64)
    schedule: list[float | None] = [*step_sizes(0.5, 1.5, 2.0, 3), None]
    exact = jko_iterates(MEAN, COVARIANCE, schedule)
    solver = SolverConfig("rk4", 8)
    blocks = []
    pushed = z
    for h, step in zip(schedule, exact, strict=True):
        spec = BlockSpec(VelocityConfig("linear"), solver, h=h)
        block = build_block(spec, (2,)).double()
        blocks.append((spec, block))
        _minimise(block, pushed, h)
        loss = jko_loss(block, pushed, h, Exact())
        assert loss.total.item() == pytest.approx(step.objective, abs=1e-4)
        assert loss.squared_movement.item() == pytest.approx(step.squared_movement, rel=1e-3)
        ratio = stopping_ratio(loss.squared_movement.item(), loss.squared_norm.item())
        assert ratio == pytest.approx(step.stopping_ratio, rel=1e-3)
        pushed = block(pushed).detach()
        torch.testing.assert_close(pushed.mean(dim=0), step.mean, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(
            torch.cov(pushed.T, correction=0), step.covariance, rtol=1e-3, atol=1e-3
        )
    nll = -log_prob(Flow.from_blocks((2,), blocks), z).value.mean().item()
    assert nll == pytest.approx(entropy(COVARIANCE), abs=1e-3)


def _minimise(block, z, h):
    optimizer = torch.optim.LBFGS(
        block.parameters(), max_iter=60, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = jko_loss(block, z, h, Exact()).total
        loss.backward()
        return loss

    optimizer.step(closure)


def test_bad_arguments():
    with pytest.raises(FlowError, match="h must be positive"):
        jko_step(MEAN, COVARIANCE, 0.0)
    with pytest.raises(FlowError, match="variances"):
        jko_step(MEAN, -COVARIANCE, 1.0)
