"""The baselines: inverse, log-determinant, mass of the density, and Gaussians in closed form."""

from __future__ import annotations

import dataclasses
import json
import math
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from flows.baselines.autoregressive import Autoregressive, AutoregressiveConfig
from flows.baselines.base import DensityModel
from flows.baselines.cnf import FlowModel
from flows.baselines.ffjord import Ffjord, FfjordConfig, RunningCosts
from flows.baselines.ignn import Ignn, IgnnConfig
from flows.baselines.iresnet import IResNet, IResNetConfig, SpectralLinear, series_log_det
from flows.baselines.otflow import OtFlow, OtFlowConfig, PotentialCosts
from flows.baselines.registry import (
    BASELINES,
    config_from_dict,
    config_to_dict,
    make_baseline,
)
from flows.baselines.residual import FixedPoint, ResidualBlock
from flows.baselines.score_sde import ScoreSde, ScoreSdeConfig
from flows.errors import FlowError
from flows.likelihood import log_normal
from flows.networks.base import Velocity
from flows.networks.config import VelocityConfig
from flows.solving.estimators import Exact
from flows.solving.solver import SolverConfig

FINE = FixedPoint(tolerance=1e-10)
CONFIGS = {
    "ffjord": FfjordConfig(
        VelocityConfig("mlp", 16, 2, "tanh", zero_init=False),
        blocks=2,
        solver=SolverConfig("rk4", 2),
        kinetic=0.1,
        jacobian=0.1,
    ),
    "otflow": OtFlowConfig(width=12, depth=2, rank=2, solver=SolverConfig("rk4", 2)),
    "ignn": IgnnConfig(
        VelocityConfig("mlp", 16, 2, "tanh", autonomous=True, zero_init=False), 3, 1.0, FINE
    ),
    "iresnet": IResNetConfig(width=16, depth=1, blocks=3, fixed_point=FINE),
    # little noise, so that an untrained network gives a density that a grid can hold
    "maf": AutoregressiveConfig(width=8, depth=1, blocks=2),
    "nsf": AutoregressiveConfig(width=8, depth=1, blocks=2, bins=4),
    "scoresde": ScoreSdeConfig(VelocityConfig("resmlp", 16, 1, zero_init=False), 0.1, 1.0, 0.05),
}


HAS_ZUKO = find_spec("zuko") is not None
MODELS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(name in ("maf", "nsf") and not HAS_ZUKO, reason="needs zuko"),
    )
    for name in BASELINES
]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def model_of(name: str, dim: int = 2) -> DensityModel:
    model = make_baseline(name, CONFIGS[name], dim, rng(3)).double()
    if isinstance(model, FlowModel):
        model.solver = SolverConfig(method="rk4", steps=8)
    if isinstance(model, IResNet):
        with torch.no_grad():
            for layer in model.layers:
                layer.affine.log_scale.uniform_(-0.3, 0.3, generator=rng(5))
                layer.affine.shift.uniform_(-0.3, 0.3, generator=rng(6))
    return model


def normal(n: int, dim: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(n, dim, generator=rng(seed), dtype=torch.float64)


def forward(model: DensityModel, z: Tensor) -> Tensor:
    """The map from data to noise, differentiably."""
    if isinstance(model, FlowModel):
        for block in model.flow:
            z = block.transport(z, solver=model.solver).z
        return z
    if isinstance(model, Autoregressive):
        return model.forward_map(z)[0]
    for layer in model.layers:
        z = layer(z)
    return z


@pytest.mark.parametrize("name", MODELS)
def test_decode_inverts_encode(name: str) -> None:
    model, z = model_of(name), normal(20)
    noise = model.encode(z)
    decoded = model.decode_checked(noise)
    assert decoded.failures == 0 and decoded.nfe > 0
    torch.testing.assert_close(decoded.z, z, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(noise, z, atol=0.05)


@pytest.mark.parametrize("name", MODELS)
def test_log_prob_is_that_of_the_jacobian(name: str) -> None:
    model, z = model_of(name, 3), normal(4, 3)
    if isinstance(model, FlowModel):
        model.solver = SolverConfig(method="rk4", steps=16)
    result = model.log_prob(z)
    # samples do not interact, so the sum over them has the Jacobian of each
    rows = torch.autograd.functional.jacobian(lambda x: forward(model, x).sum(0), z)
    log_det = torch.linalg.slogdet(rows.permute(1, 0, 2))[1]
    expected = (log_normal(forward(model, z)) + log_det).detach()
    torch.testing.assert_close(result.value, expected, rtol=1e-4, atol=1e-4)
    assert float(result.inversion_error.max()) < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_the_density_integrates_to_one(name: str) -> None:
    model, side, count = model_of(name), 10.0, 60
    axis = (torch.arange(count, dtype=torch.float64) + 0.5) * (2 * side / count) - side
    grid = torch.cartesian_prod(axis, axis)
    if isinstance(model, FlowModel):
        model.solver = SolverConfig(method="rk4", steps=4)
    else:
        model.fixed_point = FixedPoint(iterations=1)  # its inversion errors are not looked at
    mass = model.log_prob(grid).value.exp().sum() * (2 * side / count) ** 2
    assert float(mass) == pytest.approx(1, abs=5e-3)


@pytest.mark.parametrize("name", MODELS)
def test_training_lowers_the_loss_and_reaches_all_weights(name: str) -> None:
    model = make_baseline(name, CONFIGS[name], 2, rng(3))
    data = normal(64).float() * torch.tensor([2.0, 0.5]) + 1
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for step in range(12):
        optimizer.zero_grad()
        loss = model.loss(data, rng(step % 2))
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-2:]) < sum(losses[:2]) - 0.1


@pytest.mark.parametrize("name", MODELS)
def test_weights_and_configuration_are_all_of_a_model(name: str) -> None:
    first = model_of(name)
    plain = json.loads(json.dumps(config_to_dict(CONFIGS[name])))
    config = config_from_dict(name, plain)
    assert config == CONFIGS[name]
    second = make_baseline(name, config, 2, rng(9)).double()
    z = normal(5)
    assert not torch.allclose(second.encode(z), first.encode(z))
    second.load_state_dict(first.state_dict())
    if isinstance(first, FlowModel):
        second.solver = first.solver
    torch.testing.assert_close(
        second.log_prob(z).value, first.log_prob(z).value, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_generator_decides_the_weights(name: str) -> None:
    before = torch.random.get_rng_state()
    one, two, other = (make_baseline(name, CONFIGS[name], 2, rng(s)) for s in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    flat = [torch.cat([p.flatten() for p in m.parameters()]) for m in (one, two, other)]
    assert torch.equal(flat[0], flat[1]) and not torch.equal(flat[0], flat[2])


# ---------------------------------------------------------------- Gaussians in closed form


def gaussian_log_prob(z: Tensor, covariance: Tensor) -> Tensor:
    zero = torch.zeros(len(covariance), dtype=z.dtype)
    return torch.distributions.MultivariateNormal(zero, covariance).log_prob(z)


MATRIX = torch.tensor([[0.4, -0.3], [0.1, -0.5]], dtype=torch.float64)


def linear(matrix: Tensor, module: torch.nn.Linear) -> None:
    with torch.no_grad():
        module.weight.copy_(matrix)
        module.bias.zero_()


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


@pytest.mark.skipif(not HAS_ZUKO, reason="needs zuko")
def test_maf_of_constant_networks_is_a_gaussian() -> None:
    model = make_baseline("maf", CONFIGS["maf"], 2, rng()).double()
    with torch.no_grad():
        for seed, map_ in enumerate(model.maps.transform.transforms):
            map_.hyper[-1].weight.zero_()
            map_.hyper[-1].bias.normal_(std=0.5, generator=rng(seed))
    origin = model.encode(torch.zeros(1, 2, dtype=torch.float64))
    slopes = (model.encode(torch.eye(2, dtype=torch.float64)) - origin).diagonal()
    mean, std = -origin[0] / slopes, 1 / slopes
    z = normal(6)
    expected = torch.distributions.Normal(mean, std).log_prob(z).sum(dim=1)
    torch.testing.assert_close(model.log_prob(z).value, expected, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(slopes, torch.ones_like(slopes), atol=0.05)


def test_the_running_costs_are_the_integrals() -> None:
    """v = A z with a symmetric A: ‖A‖_F² in the mean over the four probes, and ∫‖A z‖² dt."""
    config = FfjordConfig(VelocityConfig("linear"), kinetic=0.7, jacobian=0.2)
    model = Ffjord(config, 2).double()
    matrix = torch.tensor([[0.5, 0.2], [0.2, -0.4]], dtype=torch.float64)
    linear(matrix, model.flow[0].velocity.affine)
    z, costs = normal(5), RunningCosts()
    probes = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 2)
    rows = [
        model.flow[0].transport(z, divergence=costs, eps=eps.expand(1, 5, 2)).log_det_probes
        for eps in probes
    ]
    log_det, kinetic, jacobian = torch.stack(rows).mean(dim=0)
    torch.testing.assert_close(log_det, matrix.trace().expand(5))
    torch.testing.assert_close(jacobian, matrix.square().sum().expand(5))
    # ∫ zᵀ e^{tA} A² e^{tA} z dt = zᵀ A (e^{2A} − I) z / 2
    integral = matrix @ (torch.matrix_exp(2 * matrix) - torch.eye(2)) / 2
    torch.testing.assert_close(kinetic, (z @ integral * z).sum(dim=1), rtol=1e-4, atol=1e-5)
    end = z @ torch.matrix_exp(matrix).T
    nll = (-log_normal(end) - matrix.trace() + 0.7 * kinetic).mean()
    eps = costs.draw_probe(z, rng(5))
    drawn = model.flow[0].transport(z, divergence=costs, eps=eps).log_det_probes
    expected = nll + (matrix.trace() - drawn[0] + 0.2 * drawn[2]).mean()
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


# ---------------------------------------------------------------- residual flows


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
    assert isinstance(layer, ResidualBlock) and layer.affine is not None
    data = 3 * normal(100).float() + 5
    layer.affine.initialise(data)
    start = layer.affine(data)
    torch.testing.assert_close(start.mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(start.std(0), torch.ones(2))
    layer.affine.initialise(data * 2)
    torch.testing.assert_close(layer.affine(data), start)
    torch.testing.assert_close(layer.affine.inverse(start), data)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: make_baseline("glow", None, 2), "baseline 'glow' is unknown"),
        (lambda: make_baseline("ignn", OtFlowConfig(), 2), "expected a IgnnConfig"),
        (lambda: make_baseline("otflow", OtFlowConfig(), 0), "dimension"),
        (lambda: config_from_dict("otflow", {"m": 3}), "unknown key m"),
        (lambda: IResNetConfig(lipschitz=1.0), "lipschitz is 1.0"),
        (lambda: IResNetConfig(estimator="exact"), "estimator"),
        (lambda: IgnnConfig(VelocityConfig("mlp")), "depends on time"),
        (lambda: OtFlowConfig(hjb=math.nan), "hjb is nan"),
        (lambda: FfjordConfig(blocks=0), "blocks is 0"),
        (lambda: ScoreSdeConfig(start=0.0), "start is 0"),
        (lambda: FixedPoint(tolerance=0.0), "tolerance 0"),
        (lambda: model_of("ignn").encode(torch.zeros(3)), "takes samples"),
        (lambda: model_of("ignn").sample(0), "at least 1 sample"),
    ],
)
def test_bad_values_are_one_sentence(make, words: str) -> None:
    with pytest.raises(FlowError, match=words):
        make()
