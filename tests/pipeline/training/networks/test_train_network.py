"""Training of one network of a block: its samples and gradients, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from flows.block import Block
from flows.networks.config import VelocityConfig
from flows.networks.piecewise import PiecewiseVelocity
from flows.solving.solver import SolverConfig
from flows.spec import BlockSpec, build_block
from pipeline.config.training import MatchingConfig, TrainConfig
from pipeline.errors import UserError
from pipeline.runtime.rng import generator
from pipeline.training.block_trainer import BlockTrainer
from tests.pipeline.gaussian_source import GaussianSource, tiny
from tests.pipeline.training.networks.small_networks import NETS, alone, settings, together
from tests.ranks import Rank, mean_of


def trainer_of(
    folder: Path, network: int | None, accelerator: Any = None, **recipe: Any
) -> BlockTrainer:
    """A trainer of one network of three, or of all."""
    stage = GaussianSource(count=60).first_stage(folder, tiny(), Accelerator())
    net = VelocityConfig("mlp", width=8, depth=1, nets=NETS, zero_init=False)
    spec = BlockSpec(net, SolverConfig("rk4", 6), objective="lfm")
    block = build_block(spec, (2,), generator(0, "weights", 0))
    if network is not None:
        assert isinstance(block.velocity, PiecewiseVelocity)
        block = Block(block.velocity.restrict(network / NETS, 1 / NETS), block.solver)
    config = TrainConfig(**{"batch_size": 10, "ema": 0.0, "grad_clip": 0.0, **recipe})
    return BlockTrainer(block, spec, stage, config, MatchingConfig(), accelerator or Accelerator())


def test_each_network_is_clipped_by_its_own_norm(tmp_path: Path) -> None:
    """The squared norms of the networks add up to that of the block, and their losses do."""
    whole = trainer_of(tmp_path, None).step().terms
    norms, total = [], 0.0
    for network in range(NETS):
        trainer = trainer_of(tmp_path, network)
        terms = trainer.step().terms
        norms.append(terms["grad_norm"])
        total += terms["total"]
        clipped = trainer_of(tmp_path, network, grad_clip=norms[-1] / 3)
        clipped.step()
        gradients = [p.grad for p in clipped.parameters if p.grad is not None]
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        assert float(norm) == pytest.approx(norms[-1] / 3, rel=1e-4)
    assert total == pytest.approx(whole["total"], rel=1e-6)
    assert sum(norm**2 for norm in norms) == pytest.approx(whole["grad_norm"] ** 2, rel=1e-5)


@pytest.mark.parametrize("ranks", [2, 4])
def test_processes_share_the_samples_of_a_network(tmp_path: Path, ranks: int) -> None:
    single = trainer_of(tmp_path, 1)
    loss = single.step().terms["total"] * 2
    gradients = [p.grad.flatten() for p in single.parameters if p.grad is not None]
    present = [True] * len(single.parameters)
    parts = [Rank(rank, ranks, present) for rank in range(ranks)]
    for part in parts:
        trainer_of(tmp_path, 1, part).step()
    expected = torch.cat([*gradients, torch.tensor([loss])])
    torch.testing.assert_close(mean_of(parts), expected, rtol=1e-4, atol=1e-6)


def test_a_network_computes_the_samples_of_its_time_alone(tmp_path: Path) -> None:
    counts = []
    for network in range(NETS):
        trainer, seen = trainer_of(tmp_path, network, batch_size=30), []
        assert isinstance(trainer.block.velocity, PiecewiseVelocity)
        (net,) = trainer.block.velocity.nets
        net.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0]))
        trainer.step()
        (times,) = seen
        assert bool(((times >= network / NETS) & (times < (network + 1) / NETS)).all())
        counts.append(len(times))
    assert counts == [10, 10, 10]  # one time in each of 30 equal parts


@pytest.mark.parametrize(
    ("changes", "network", "message"),
    [
        (("train.objective=lfm", "schedule.max_blocks=2"), 0, "train.objective is lfm"),
        (("velocity.nets=1",), 0, "velocity.nets is 1"),
        ((), NETS, f"--network is {NETS}; expected 0 to {NETS - 1}"),
        ((), -1, "--network is -1"),
        (("fm.snapshot_every=5",), 0, "fm.snapshot_every is 5"),
    ],
)
def test_what_does_not_train_alone_is_refused(
    tmp_path: Path, changes: tuple[str, ...], network: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        alone(settings(*changes), tmp_path / "run", network)
    assert not (tmp_path / "run").exists()


def test_fsdp_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both to train a network and to join them."""
    for network in range(NETS):
        assert alone(settings(), tmp_path / "run", network)
    for module in ("train_network", "join"):
        name = f"pipeline.training.networks.{module}.shards_networks"
        monkeypatch.setattr(name, lambda _: True)
    with pytest.raises(UserError, match="FSDP divides a whole one"):
        alone(settings(), tmp_path / "other", 0)
    with pytest.raises(UserError, match="expected a launch without FSDP"):
        together(settings(), tmp_path / "run")


def test_networks_of_a_run_train_alone_or_together(tmp_path: Path) -> None:
    assert together(settings(), tmp_path / "together").complete
    with pytest.raises(UserError, match="trains its networks together"):
        alone(settings(), tmp_path / "together", 0)
    stopped = settings("train.max_minutes=1e-9")
    assert not together(stopped, tmp_path / "stopped").complete
    with pytest.raises(UserError, match="trains its networks together"):
        alone(settings(), tmp_path / "stopped", 0)


def test_a_network_with_other_settings_does_not_join_a_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert alone(settings(), run, 0)
    with pytest.raises(UserError, match="was started with train.lr=0.01"):
        alone(settings("train.lr=0.02"), run, 1)
    for iterations in (8, 16):
        with pytest.raises(UserError, match=f"train.iterations is {iterations}; expected 12"):
            alone(settings(f"train.iterations={iterations}"), run, 1)
    assert alone(settings("train.log_every=2"), run, 1)  # it decides no weights
