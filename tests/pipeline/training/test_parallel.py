"""A batch that does not divide by the number of processes still has one loss and gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from flows.networks.config import VelocityConfig
from flows.solving.solver import SolverConfig
from flows.spec import BlockSpec, build_block
from pipeline.config.training import JkoConfig, MatchingConfig, TrainConfig
from pipeline.errors import UserError
from pipeline.runtime.rng import generator
from pipeline.training.block_trainer import BlockTrainer
from tests.pipeline.gaussian_source import GaussianSource, tiny
from tests.ranks import Rank, mean_of


@pytest.mark.parametrize(("batch", "ranks"), [(7, 2), (10, 4), (8, 2)])
@pytest.mark.parametrize(
    ("objective", "changes"),
    [
        ("jko", {"divergence": "exact"}),
        ("jko", {"divergence": "hutchinson"}),
        ("lfm", {}),
        ("lfm", {"coupling": "ot"}),
    ],
)
def test_the_gradient_is_that_of_the_whole_batch(
    tmp_path: Path, batch: int, ranks: int, objective: str, changes: dict[str, str]
) -> None:
    stage = GaussianSource(count=60).first_stage(tmp_path, tiny(), Accelerator())
    h = 0.5 if objective == "jko" else None
    spec = BlockSpec(velocity=tiny().velocity, h=h, objective=objective)
    recipe = TrainConfig(batch_size=batch, grad_clip=0.0, ema=0.0)
    kind = JkoConfig if objective == "jko" else MatchingConfig
    options = kind(**changes)

    def trained(accelerator: Accelerator | Rank) -> tuple[BlockTrainer, float]:
        block = build_block(spec, (2,), generator(0, "weights", 0))
        training = BlockTrainer(block, spec, stage, recipe, options, accelerator)  # type: ignore[arg-type]
        return training, training.step().terms["total"] * training.block.velocity.dim

    alone, loss = trained(Accelerator())
    gradients = [p.grad.flatten() for p in alone.parameters if p.grad is not None]
    expected = torch.cat([*gradients, torch.tensor([loss])])
    parts = [Rank(rank, ranks) for rank in range(ranks)]
    for part in parts:
        trained(part)
    torch.testing.assert_close(mean_of(parts), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("batch", "ranks"), [(8, 2), (7, 4)])
def test_a_network_without_samples_on_a_rank_has_the_gradient_of_the_batch(
    tmp_path: Path, batch: int, ranks: int
) -> None:
    """A block of eight networks: no rank has samples of the times that all of them cover."""
    stage = GaussianSource(count=60).first_stage(tmp_path, tiny(), Accelerator())
    net = VelocityConfig("mlp", width=8, depth=1, nets=8, zero_init=False)
    spec = BlockSpec(net, SolverConfig("rk4", 8), objective="lfm")
    recipe, options = TrainConfig(batch_size=batch, grad_clip=0.0, ema=0.0), MatchingConfig()

    def trained(accelerator: Accelerator | Rank) -> BlockTrainer:
        block = build_block(spec, (2,), generator(0, "weights", 0))
        trainer = BlockTrainer(block, spec, stage, recipe, options, accelerator)  # type: ignore[arg-type]
        trainer.step()
        return trainer

    alone = trained(Accelerator())
    parts = [Rank(rank, ranks, present=[p.grad is not None for p in alone.parameters])
             for rank in range(ranks)]  # fmt: skip
    trainers = [trained(part) for part in parts]
    gradients = [
        torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
        for p in alone.parameters
    ]
    torch.testing.assert_close(mean_of(parts)[:-1], torch.cat(gradients), rtol=1e-4, atol=1e-6)
    for trainer in trainers:  # every rank steps the same parameters
        for parameter, other in zip(trainer.parameters, alone.parameters, strict=True):
            assert (parameter.grad is None) == (other.grad is None)


@pytest.mark.parametrize("objective", ["jko", "lfm"])
@pytest.mark.parametrize("rank", [0, 2])
def test_more_ranks_than_samples_are_an_error_on_every_rank(
    tmp_path: Path, objective: str, rank: int
) -> None:
    """Every objective raises it, on ranks with samples too, before any collective."""
    stage = GaussianSource(count=60).first_stage(tmp_path, tiny(), Accelerator())
    spec = BlockSpec(velocity=tiny().velocity, h=None, objective=objective)
    block, recipe = build_block(spec, (2,), generator(0, "weights", 0)), TrainConfig(batch_size=2)
    options = JkoConfig() if objective == "jko" else MatchingConfig()
    with pytest.raises(UserError, match="batch_size is 2; expected at least .*3"):
        BlockTrainer(block, spec, stage, recipe, options, Rank(rank, 3))  # type: ignore[arg-type]
