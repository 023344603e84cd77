"""Divergence estimators against the exact trace of known Jacobians."""

from __future__ import annotations

import math

import pytest
import torch

from flows.errors import FlowError
from flows.networks.base import Velocity
from flows.networks.config import VelocityConfig
from flows.networks.registry import KINDS, make_velocity
from flows.solving.estimators import Exact, FiniteDifference, Hutchinson, make_divergence
from tests.flows.problems import Coupled, points

SHAPES = [(2,), (6,), (3, 2), (2, 2, 3)]
T = 0.3


def time() -> torch.Tensor:
    return torch.tensor(T, dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_exact_is_the_trace(shape, chunk):
    field = Coupled(shape)
    z = points(field)
    v, div = Exact(chunk=chunk)(field, time(), z)
    torch.testing.assert_close(v, field(time(), z))
    torch.testing.assert_close(div, field.exact_divergence(T, z))


ESTIMATORS = [
    Hutchinson(4000, "rademacher", "jvp"),
    Hutchinson(4000, "gaussian", "jvp"),
    Hutchinson(4000, "rademacher", "vjp"),
    FiniteDifference(sigma0=1e-4, probes=4000),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_estimates_are_unbiased_with_the_theoretical_variance(shape, estimator):
    """Var εᵀJε = 2‖S‖² (Gaussian), 2(‖S‖² − ‖diag S‖²) (Rademacher); S = (J + Jᵀ)/2."""
    field = Coupled(shape)
    z = points(field, batch=3)
    eps = estimator.draw_probe(z, torch.Generator().manual_seed(11))
    with torch.no_grad():
        v, estimates = estimator.estimates(field, time(), z, eps)
    torch.testing.assert_close(v, field(time(), z))
    jac = field.jacobian(T, z)
    symmetric = (jac + jac.transpose(1, 2)) / 2
    variance = 2 * symmetric.square().sum(dim=(1, 2))
    if getattr(estimator, "noise", "gaussian") == "rademacher":
        variance -= 2 * symmetric.diagonal(dim1=1, dim2=2).square().sum(dim=1)
    error = estimates.mean(dim=0) - field.exact_divergence(T, z)
    assert (error.abs() <= 4.5 * (variance / 4000).sqrt() + 1e-4).all()
    torch.testing.assert_close(estimates.var(dim=0), variance, rtol=0.25, atol=1e-6)


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
@pytest.mark.parametrize("probes", [1, 3])
def test_both_modes_are_the_same_number(noise, probes):
    field = Coupled((2, 2, 2))
    z = points(field)
    forward, reverse = (Hutchinson(probes, noise, mode) for mode in ("jvp", "vjp"))
    eps = forward.draw_probe(z, torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        forward.estimates(field, time(), z, eps)[1], reverse.estimates(field, time(), z, eps)[1]
    )


def test_finite_difference_tends_to_the_derivative():
    """The error is of first order in σ₀: ten times smaller for a step ten times smaller."""
    field = Coupled((5,))
    z = points(field)
    eps = FiniteDifference().draw_probe(z, torch.Generator().manual_seed(0))
    target = Hutchinson(noise="gaussian")(field, time(), z, eps)[1]
    errors = [
        (FiniteDifference(sigma0)(field, time(), z, eps)[1] - target).abs().mean().item()
        for sigma0 in (1e-2, 1e-3, 1e-4)
    ]
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.1)


def test_finite_difference_uses_the_papers_step():
    seen = []

    class Spy(Coupled):
        def forward(self, t, z):
            seen.append(z)
            return super().forward(t, z)

    field = Spy((2, 2))
    z = points(field)
    eps = FiniteDifference().draw_probe(z, torch.Generator().manual_seed(0))
    FiniteDifference()(field, time(), z, eps)
    (batch,) = seen  # one network call
    torch.testing.assert_close(batch, torch.cat([z, z + 0.02 / math.sqrt(4) * eps[0]]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "estimator",
    [Exact(chunk=5), Hutchinson(2, mode="jvp"), Hutchinson(2), FiniteDifference(1e-5, 2)],
    ids=str,
)
def test_every_network_supports_every_estimator_in_training(kind, estimator):
    """Value against autograd's Jacobian, and a gradient that reaches the parameters."""
    config = VelocityConfig(
        kind, width=8, depth=1, time_features=4, heads=2, zero_init=False
    )
    net = make_velocity(config, (2, 4, 2), torch.Generator().manual_seed(0)).double()
    z = points(net, batch=2)
    eps = estimator.draw_probe(z, torch.Generator().manual_seed(1))
    v, estimates = estimator.estimates(net, time(), z, eps)
    flat = net.dim
    full = torch.autograd.functional.jacobian(lambda x: net(time(), x), z)
    for index in range(2):
        jac = full[index, ..., index, :, :, :].reshape(flat, flat)
        if eps is None:
            target = jac.trace()[None]
        else:
            probe = eps[:, index].flatten(1)
            target = ((probe @ jac.T) * probe).sum(dim=1)
        torch.testing.assert_close(estimates[:, index], target, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(v, net(time(), z))
    estimates.sum().backward()
    weights = [p for name, p in net.named_parameters() if name.endswith("weight")]
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in weights)


def test_probes_come_from_the_generator():
    z = torch.zeros(4, 3)
    for estimator in (Hutchinson(2), Hutchinson(2, "gaussian"), FiniteDifference(probes=2)):
        first, again, other = (
            estimator.draw_probe(z, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
        )
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
    rademacher = Hutchinson(500).draw_probe(z, torch.Generator().manual_seed(0))
    assert set(rademacher.unique().tolist()) == {-1.0, 1.0}
    assert abs(rademacher.mean()) < 0.05


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: make_divergence("approximate"), "unknown divergence 'approximate'"),
        (lambda: make_divergence("exact", probes=0), "at least 1 probe"),
        (lambda: make_divergence("hutchinson", noise="cauchy"), "unknown noise"),
        (lambda: make_divergence("hutchinson", mode="both"), "unknown mode"),
        (lambda: make_divergence("finite-difference", sigma0=0.0), "sigma0 must be positive"),
        (lambda: make_divergence("exact", chunk=0), "chunk must be at least 1"),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(FlowError, match=words):
        call()


def test_the_penalty_is_the_frobenius_norm_of_the_jacobian():
    """Of a linear field: the mean over probes is tr A − λ‖A‖²_F."""
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(4, 4, generator=generator, dtype=torch.float64)

    class Linear(Velocity):
        def forward(self, t, z):
            return z @ matrix.T

    z = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    t = torch.tensor(0.3, dtype=torch.float64)
    estimator = FiniteDifference(probes=40000, penalty=0.3)
    eps = estimator.draw_probe(z, generator)
    actual = estimator(Linear((4,)), t, z, eps)[1]
    plain = FiniteDifference(probes=40000)(Linear((4,)), t, z, eps)[1]
    norm = matrix.square().sum()
    assert torch.allclose(plain - actual, 0.3 * norm.expand(2), rtol=0.03)
    assert torch.allclose(actual, (matrix.trace() - 0.3 * norm).expand(2), atol=0.3)
    with pytest.raises(FlowError, match="penalty"):
        FiniteDifference(penalty=-1.0)
