"""Small baselines for tests, with their configurations, and samples."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from flows.baselines.autoregressive import Autoregressive, AutoregressiveConfig
from flows.baselines.base import DensityModel
from flows.baselines.cnf import FlowModel
from flows.baselines.ffjord import FfjordConfig
from flows.baselines.ignn import IgnnConfig
from flows.baselines.iresnet import IResNet, IResNetConfig
from flows.baselines.otflow import OtFlowConfig
from flows.baselines.registry import (
    BASELINES,
    make_baseline,
)
from flows.baselines.residual import FixedPoint
from flows.baselines.score_sde import ScoreSdeConfig
from flows.networks.config import VelocityConfig
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


def gaussian_log_prob(z: Tensor, covariance: Tensor) -> Tensor:
    zero = torch.zeros(len(covariance), dtype=z.dtype)
    return torch.distributions.MultivariateNormal(zero, covariance).log_prob(z)


MATRIX = torch.tensor([[0.4, -0.3], [0.1, -0.5]], dtype=torch.float64)


def linear(matrix: Tensor, module: torch.nn.Linear) -> None:
    with torch.no_grad():
        module.weight.copy_(matrix)
        module.bias.zero_()
