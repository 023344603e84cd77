"""Objectives against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from flows.block import Block
from flows.errors import FlowError
from flows.networks.config import VelocityConfig
from flows.networks.registry import make_velocity
from flows.objectives.losses import interpolate, jko_loss, matching_loss, ou_target
from flows.solving.estimators import Exact, FiniteDifference
from flows.solving.solver import SolverConfig
from tests.flows.problems import Formula, affine, block_of, points, regression


def test_jko_terms_on_an_affine_flow():
    problem = affine()
    z = points(problem, batch=50)
    h = 0.4
    loss = jko_loss(block_of(problem, "dopri5", rtol=1e-9, atol=1e-9), z, h, Exact())
    target = problem.exact(z)
    potential = target.square().sum(dim=1).mean() / 2
    squared = (target - z).square().sum(dim=1).mean()
    torch.testing.assert_close(loss.potential, potential, rtol=1e-7, atol=0)
    torch.testing.assert_close(loss.neg_log_det, -problem.matrix.trace())
    torch.testing.assert_close(loss.movement, squared / (2 * h), rtol=1e-7, atol=0)
    torch.testing.assert_close(loss.squared_movement, squared, rtol=1e-7, atol=0)
    torch.testing.assert_close(loss.squared_norm, 2 * potential, rtol=1e-7, atol=0)
    assert loss.total.item() == pytest.approx(
        (loss.potential + loss.neg_log_det + loss.movement).item()
    )
    per_dim = loss.per_dim(3)
    assert per_dim["total"] == pytest.approx(loss.total.item() / 3)
    assert set(per_dim) == {"total", "potential", "neg_log_det", "movement"}


def test_free_block_has_no_movement_term():
    problem = affine()
    z = points(problem)
    free = jko_loss(block_of(problem), z, None, Exact())
    bound = jko_loss(block_of(problem), z, 0.5, Exact())
    assert free.movement is None
    assert "movement" not in free.per_dim(3)
    torch.testing.assert_close(free.total, free.potential + free.neg_log_det)
    torch.testing.assert_close(bound.total - free.total, bound.squared_movement / (2 * 0.5))


def test_total_plus_constant_is_the_kl_of_the_pushed_samples():
    """The free objective at the exact whitening of N(0, s²) is its minimum, ½ − log(1/s)."""
    s = 3.0
    z = s * torch.randn(200_000, 1, generator=torch.Generator().manual_seed(0)).double()
    rate = math.log(1 / s)
    loss = jko_loss(block_of(Formula(lambda t, x: rate * x, 1), steps=20), z, None, Exact())
    assert loss.total.item() == pytest.approx(0.5 + math.log(s), abs=5e-3)


def test_jko_gradient_is_that_of_the_formula():
    """For v = a z in one dimension the loss is an explicit function of a; compare slopes."""
    z = points(Formula(lambda t, x: x, 1), batch=30)
    a = torch.tensor(-0.3, dtype=torch.float64, requires_grad=True)
    block = block_of(Formula(lambda t, x: a * x, 1), steps=30)
    jko_loss(block, z, 0.7, Exact()).total.backward()
    b = torch.tensor(-0.3, dtype=torch.float64, requires_grad=True)
    second = z.square().mean()
    explicit = b.exp() ** 2 * second / 2 - b + (b.exp() - 1) ** 2 * second / (2 * 0.7)
    explicit.backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("h", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_step_sizes(h):
    with pytest.raises(FlowError, match="h must be positive"):
        jko_loss(block_of(affine()), points(affine()), h, Exact())


def test_missing_probe():
    with pytest.raises(FlowError, match="needs its probe"):
        jko_loss(block_of(affine()), points(affine()), 1.0, FiniteDifference())


@pytest.mark.parametrize("kind", ["linear", "trigonometric"])
def test_interpolant_ends_and_derivative(kind):
    generator = torch.Generator().manual_seed(0)
    z, target = torch.randn(2, 6, 2, 3, generator=generator, dtype=torch.float64)
    for time, end in ((0.0, z), (1.0, target)):
        at = torch.full((6,), time, dtype=torch.float64)
        torch.testing.assert_close(interpolate(z, target, at, kind)[0], end)
    t = torch.rand(6, generator=generator, dtype=torch.float64)
    step = 1e-6
    above, below = (interpolate(z, target, t + s, kind)[0] for s in (step, -step))
    torch.testing.assert_close(
        interpolate(z, target, t, kind)[1], (above - below) / (2 * step), rtol=1e-6, atol=1e-8
    )


def test_ou_target_keeps_the_standard_normal_and_contracts_the_mean():
    generator = torch.Generator().manual_seed(0)
    z, noise = torch.randn(2, 100_000, 2, generator=generator, dtype=torch.float64)
    moved = ou_target(z, 0.3, noise)
    assert moved.var(dim=0).tolist() == pytest.approx([1, 1], abs=0.02)
    shifted = ou_target(z + 5, 0.3, noise)
    expected = 5 * math.exp(-0.3)
    assert (shifted - moved).mean(dim=0).tolist() == pytest.approx([expected] * 2)
    assert torch.equal(ou_target(z, None, noise), noise)


def test_flow_matching_regresses_to_the_closed_form_of_gaussians():
    """Between N(0, s²) and N(0, 1) at a fixed time the best field is E[İ | I], linear in I.

    The loss of the exact linear field of the linear interpolant is its conditional variance
    s² / ((1 − t)² s² + t²), averaged over t; a trained loss can only be above it.
    """
    s, n = 2.0, 200_000
    z = s * torch.randn(n, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def best(t, x):
        t = t[:, None]
        return x * (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2)

    generator = torch.Generator().manual_seed(1)
    loss = regression(Formula(best, 1), z, None, generator)
    t = torch.linspace(0, 1, 20001, dtype=torch.float64)
    variance = s**2 / ((1 - t) ** 2 * s**2 + t**2)
    assert loss.item() == pytest.approx(torch.trapezoid(variance, t).item(), rel=0.01)
    worse = regression(Formula(lambda t, x: 1.1 * best(t, x), 1), z, None, generator)
    assert worse > loss


def test_lfm_block_carries_gaussian_data_along_the_ou_process():
    """A linear-in-z field trained by LFM pushes N(m, s²) to N(e^{−γ} m, …) and is reproducible."""
    gamma, mean, s = 0.5, 2.0, 0.5
    config = VelocityConfig("mlp", width=32, depth=1, activation="tanh")
    results = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(0)
        velocity = make_velocity(config, (1,), generator)
        optimizer = torch.optim.Adam(velocity.parameters(), 1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
        for _ in range(400):
            z = mean + s * torch.randn(1024, 1, generator=generator)
            optimizer.zero_grad()
            regression(
                velocity, z, gamma, generator, interpolant="trigonometric"
            ).backward()
            optimizer.step()
            schedule.step()
        z = mean + s * torch.randn(20_000, 1, generator=generator)
        with torch.no_grad():
            results.append(Block(velocity, SolverConfig(steps=8))(z))
    assert torch.equal(*results)
    assert results[0].mean().item() == pytest.approx(math.exp(-gamma) * mean, abs=0.05)
    variance = math.exp(-2 * gamma) * s**2 + 1 - math.exp(-2 * gamma)
    assert results[0].var().item() == pytest.approx(variance, rel=0.1)


@pytest.mark.parametrize("gamma", [0.0, -0.1, math.nan, math.inf])
def test_bad_times_of_the_process(gamma):
    z = points(affine())
    with pytest.raises(FlowError, match="gamma must be positive"):
        ou_target(z, gamma, z)


def test_the_matching_loss_is_a_mean_over_samples_and_a_sum_over_dimensions():
    """The field 0 leaves E ‖z' − z‖²."""
    z, target = points(affine(), batch=5), points(affine(), batch=5, seed=2)
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    zero = Formula(lambda t, x: 0 * x, 3)
    loss = matching_loss(zero, z, target, t)
    expected = (target - z).square().sum() / 5
    torch.testing.assert_close(loss.total, expected)
    assert loss.samples == 5 and loss.per_dim(3)["total"] == pytest.approx(float(expected) / 3)
    with pytest.raises(FlowError, match="unknown interpolant 'cubic'"):
        matching_loss(zero, z, target, t, "cubic")
