"""The baselines: inverse, log-determinant, mass of the density, and Gaussians in closed form."""

from __future__ import annotations

import json
import math

import pytest
import torch

from flows.baselines.autoregressive import AutoregressiveConfig
from flows.baselines.cnf import FlowModel
from flows.baselines.ffjord import FfjordConfig
from flows.baselines.ignn import IgnnConfig
from flows.baselines.iresnet import IResNetConfig
from flows.baselines.otflow import OtFlowConfig
from flows.baselines.registry import (
    config_from_dict,
    config_to_dict,
    make_baseline,
)
from flows.baselines.residual import FixedPoint
from flows.baselines.score_sde import ScoreSdeConfig
from flows.errors import FlowError
from flows.likelihood import log_normal
from flows.networks.config import VelocityConfig
from flows.solving.solver import SolverConfig
from tests.flows.baselines.models import CONFIGS, HAS_ZUKO, MODELS, forward, model_of, normal, rng


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


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: make_baseline("glow", None, 2), "baseline 'glow' is unknown"),
        (lambda: make_baseline("ignn", OtFlowConfig(), 2), "expected a IgnnConfig"),
        (lambda: make_baseline("otflow", OtFlowConfig(), 0), "dimension"),
        (lambda: make_baseline("nsf", AutoregressiveConfig(), 2), "nsf has 0 bins; .* at least 2"),
        (lambda: make_baseline("maf", AutoregressiveConfig(bins=8), 2), "8 bins; expected 0"),
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
