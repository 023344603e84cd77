"""JKO blocks in bfloat16: the same objective up to rounding, with float32 around the network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from flows.mixed_precision import MixedPrecision
from flows.networks.config import VelocityConfig
from flows.networks.registry import make_velocity
from flows.solving.estimators import FiniteDifference, Hutchinson
from flows.spec import BlockSpec, build_block
from pipeline.config.load import load_config
from pipeline.config.training import JkoConfig, TrainConfig
from pipeline.errors import UserError
from pipeline.runtime.rng import generator
from pipeline.storage.shards.reader import StoreReader
from pipeline.training.block_trainer import BlockTrainer
from tests.pipeline.gaussian_source import GaussianSource, tiny

NETWORK = VelocityConfig(kind="mlp", width=64, depth=2, zero_init=False, activation="softplus")
RECIPE: dict[str, Any] = {"iterations": 10, "batch_size": 256, "warmup": 0, "ema": 0.0}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> StoreReader:
    folder = tmp_path_factory.mktemp("stage")
    return GaussianSource().first_stage(folder, tiny(), Accelerator())


def trainer(stage: StoreReader, precision: str, **options: Any) -> BlockTrainer:
    spec = BlockSpec(velocity=NETWORK, h=0.5)
    block = build_block(spec, (2,), generator(0, "weights", 0))
    recipe = TrainConfig(**RECIPE, precision=precision)  # type: ignore[arg-type]
    return BlockTrainer(block, spec, stage, recipe, JkoConfig(**options), Accelerator())


@pytest.mark.parametrize("divergence", ["hutchinson", "exact"])
def test_the_objective_and_its_gradient_are_those_of_float32(
    stage: StoreReader, divergence: str
) -> None:
    single, half = (trainer(stage, name, divergence=divergence) for name in ("fp32", "bf16"))
    seen: set[torch.dtype] = set()
    for layer in half.block.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(lambda _, __, out: seen.add(out.dtype))
    expected, found = single.objective.gradient(0), half.objective.gradient(0)
    assert 0 < (found - expected).norm() / expected.norm() < 0.03
    for _ in range(10):
        terms, others = single.step().terms, half.step().terms
        assert others["total"] == pytest.approx(terms["total"], rel=0.02)
        assert others["neg_log_det"] == pytest.approx(terms["neg_log_det"], rel=0.03, abs=0.01)
    assert {p.dtype for p in half.parameters} == {torch.float32}
    if divergence == "hutchinson":  # the exact one calls no layer but their weights
        assert seen == {torch.bfloat16}


def test_a_finite_difference_is_lost_to_rounding_and_refused() -> None:
    """The two points are 0.02 / √D apart; bfloat16 has three digits."""
    net = make_velocity(NETWORK, (48,), generator(1))
    z, t = torch.randn(500, 48, generator=generator(2)), torch.tensor(0.3)
    half, errors = MixedPrecision(net), {}
    for estimator in (FiniteDifference(noise="rademacher"), Hutchinson()):
        eps = estimator.draw_probe(z, generator(3))
        with torch.no_grad():
            exact, rounded = (estimator(field, t, z, eps)[1] for field in (net, half))
        assert rounded.dtype == torch.float32
        errors[type(estimator)] = float((rounded - exact).norm() / exact.norm())
    assert errors[Hutchinson] < 0.05 and errors[FiniteDifference] > 0.5
    with pytest.raises(UserError, match="precision=bf16 applies to .*jko.divergence=hutchinson"):
        load_config("mnist", ["train.precision=bf16"])
    changed = load_config("mnist", ["train.precision=bf16", "jko.divergence=hutchinson"])
    assert changed.train.precision == "bf16"
