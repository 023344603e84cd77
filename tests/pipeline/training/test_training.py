"""Training against closed forms on Gaussian data, and every part of the recipe alone."""

from __future__ import annotations

import copy
import itertools
import json
import math
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from flows.objectives.losses import jko_loss
from flows.objectives.schedule import step_sizes
from flows.solving.solver import SolverConfig
from flows.spec import BlockSpec, build_block
from pipeline.config.training import JkoConfig, TrainConfig
from pipeline.data.standardisation import Standardisation
from pipeline.errors import JkoflowError, UserError
from pipeline.optim.ema import Ema
from pipeline.runs.directory import read_manifest
from pipeline.runs.manifest import Manifest
from pipeline.runs.run import load_blocks
from pipeline.runtime.rng import generator
from pipeline.storage.shards.opening import open_store
from pipeline.storage.shards.reader import StoreReader
from pipeline.training.block_loop import Limits
from pipeline.training.block_trainer import BlockTrainer
from pipeline.training.train import Outcome, train
from tests.flows.closed_form import GaussianStep, jko_step, kl_to_standard
from tests.pipeline.gaussian_source import COVARIANCE, GaussianSource, quiet, tiny

BY_RULE = ("jko.h=null", "jko.h0=0.4", "schedule.rho=1.5")


def run(folder: Path, *overrides: str, source: GaussianSource | None = None) -> Outcome:
    source = source or GaussianSource()
    return train(tiny(*overrides), folder, Accelerator(), quiet, resume=True, source=source)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return list(read_manifest(folder).blocks)


# --------------------------------------------------------------------- towards the closed form


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blocks by the rule, up to the stopping ratio, then the free block."""
    folder = tmp_path_factory.mktemp("long") / "run"
    rule = ("schedule.max_blocks=8", "schedule.tolerance=0.02", "schedule.free_block=true")
    outcome = run(folder, *BY_RULE, *rule)
    assert outcome.complete
    return folder


def exact_steps(folder: Path) -> list[GaussianStep]:
    """Compute the closed form of every block from mean and covariance of its samples."""
    steps = []
    for index, row in enumerate(rows_of(folder)):
        z = open_store(folder / "stages" / f"stage-{index:02d}", "stage").field("z").double()
        steps.append(jko_step(z.mean(0), z.T.cov(correction=0), row.h))
    return steps


def test_every_block_reaches_its_minimum(long: Path) -> None:
    for row, exact in zip(rows_of(long), exact_steps(long), strict=True):
        assert row.movement == pytest.approx(math.sqrt(exact.squared_movement), rel=0.1)
        assert row.ter == pytest.approx(exact.stopping_ratio, rel=0.2)
        # never below the minimum, which is over all maps
        assert -1e-4 < row.terms["total"] - exact.objective < 1e-3


def test_the_objective_falls_to_the_minimum(long: Path) -> None:
    lines = [json.loads(line) for line in (long / "log.jsonl").read_text().splitlines()]
    course = [row["total"] * 2 for row in lines if row.get("block") == 0 and "event" not in row]
    minimum = exact_steps(long)[0].objective
    assert [row["step"] for row in lines[: len(course)]] == [20, 40, 60]
    assert course[0] > course[-1]
    assert course[-1] == pytest.approx(minimum, abs=0.1)  # of 20 batches of 256


def test_the_rule_stops_and_the_free_block_follows(long: Path) -> None:
    rows = rows_of(long)
    assert rows[-1].h is None and all(row.h is not None for row in rows[:-1])
    assert [row.h for row in rows[:-1]] == step_sizes(0.4, 1.5, 5.0, 8)[: len(rows) - 1]
    assert len(rows) - 1 < 8  # the rule, not the limit
    assert rows[-2].ter < 0.02
    assert all(row.ter >= 0.02 for row in rows[:-2])


def test_the_free_block_ends_at_the_standard_normal(long: Path) -> None:
    flow = load_blocks(long, read_manifest(long))
    covariance = torch.tensor(COVARIANCE, dtype=torch.float64)
    z = torch.linalg.cholesky(covariance).float() @ torch.randn(2, 20_000, generator=generator(7))
    end = flow.encode(z.T).double()
    before, after = (kl_to_standard(x.mean(0), x.T.cov()) for x in (z.T.double(), end))
    assert before > 0.5 and after < 0.01


def test_the_limit_stops_without_a_free_block(tmp_path: Path) -> None:
    quick = ("train.iterations=2", "schedule.max_blocks=2", "schedule.tolerance=1e-9")
    assert run(tmp_path / "a", *BY_RULE, *quick).blocks == 2
    assert all(row.h is not None for row in rows_of(tmp_path / "a"))
    assert run(tmp_path / "b", *BY_RULE, *quick, "schedule.free_block=true").blocks == 3
    # a rule that is met at once leaves one block
    at_once = (*BY_RULE, "train.iterations=2", "schedule.tolerance=0.9")
    assert run(tmp_path / "c", *at_once).blocks == 1


def test_a_training_stopped_by_time_resumes_to_the_same_flow(tmp_path: Path) -> None:
    quick = ("train.iterations=6",)
    run(tmp_path / "whole", *quick)
    pieces = [run(tmp_path / "pieces", *quick, "train.max_minutes=1e-9") for _ in range(20)]
    complete = [outcome.complete for outcome in pieces]
    assert complete.count(False) >= 3 * 5 and complete[-1]  # a step or so a call
    for index in range(3):
        name = f"blocks/block-{index:02d}.safetensors"
        whole, pieces = tmp_path / "whole" / name, tmp_path / "pieces" / name
        assert whole.read_bytes() == pieces.read_bytes()


def test_seconds_are_those_of_the_clock_also_after_a_resume(tmp_path: Path) -> None:
    """A clock that ticks once a call gives every step one second; other work takes none."""
    config = tiny("train.iterations=6", "schedule.max_blocks=1")
    until: int | None
    for until in (2, None):
        train(
            config, tmp_path / "run", Accelerator(), quiet, resume=True, source=GaussianSource(),
            until=until, clock=itertools.count().__next__,
        )  # fmt: skip
    assert {row.seconds for row in rows_of(tmp_path / "run")} == {6.0}


# ------------------------------------------------------------------------ one block, its recipe

RECIPE: dict[str, Any] = {
    "iterations": 10, "batch_size": 64, "lr": 0.02, "warmup": 1, "ema": 0.0, "grad_clip": 0.0,
    "lr_final": 0.1,
}  # fmt: skip


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> StoreReader:
    folder = tmp_path_factory.mktemp("stage")
    return GaussianSource().first_stage(folder, tiny(), Accelerator())


def trainer(stage: StoreReader, **changes: Any) -> BlockTrainer:
    spec = BlockSpec(velocity=tiny().velocity, h=0.5)
    block = build_block(spec, (2,), generator(0, "weights", 0))
    names = {field.name for field in fields(TrainConfig)}
    recipe = TrainConfig(**RECIPE | {key: changes[key] for key in changes if key in names})
    objective = {key: changes[key] for key in changes if key not in names}
    options = JkoConfig(**{"divergence": "exact"} | objective)  # type: ignore[arg-type]
    return BlockTrainer(block, spec, stage, recipe, options, Accelerator())


def test_steps_are_adams(stage: StoreReader) -> None:
    """A loop written out with the same batches, loss and learning rates."""
    training = trainer(stage)
    block = copy.deepcopy(training.block)
    optimizer = torch.optim.Adam(block.parameters(), RECIPE["lr"])
    for step in range(4):
        cosine = 0.5 * (1 + math.cos(math.pi * step / 10))
        optimizer.param_groups[0]["lr"] = 0.02 * (0.1 + 0.9 * cosine)
        z = stage.field("z")[training.batches.indices(step)]
        optimizer.zero_grad()
        expected = jko_loss(block, z, 0.5, training.objective.divergence).total
        expected.backward()
        optimizer.step()
        actual = training.step().terms["total"]
        assert actual == pytest.approx(expected.item() / 2, rel=1e-5)
    for mine, theirs in zip(training.block.parameters(), block.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_every_step_has_the_learning_rate_of_the_schedule(stage: StoreReader) -> None:
    training = trainer(stage, warmup=4, lr=1e-9)
    for step in range(10):
        training.step()
        expected = 1e-9 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / 10)))
        expected *= min(1, (step + 1) / 4)
        for group in training.optimizer.param_groups:
            assert group["lr"] == pytest.approx(expected)


def test_the_gradient_is_clipped(stage: StoreReader) -> None:
    free, clipped = trainer(stage), trainer(stage, grad_clip=0.01)
    norm = free.step().terms["grad_norm"]
    assert norm > 0.1
    assert clipped.step().terms["grad_norm"] == pytest.approx(norm, rel=1e-5)  # before clipping
    gradient = torch.cat([p.grad.flatten() for p in clipped.parameters if p.grad is not None])
    assert gradient.norm().item() == pytest.approx(0.01, rel=1e-3)


def test_the_finished_block_has_the_averaged_weights(stage: StoreReader) -> None:
    training = trainer(stage, ema=0.7)
    follower = Ema(copy.deepcopy(training.block), 0.7)
    for _ in range(5):
        training.step()
        follower.update(training.block)
    last = copy.deepcopy(training.block.state_dict())
    kept = training.finish().state_dict()
    for name, tensor in kept.items():
        assert torch.equal(tensor, follower.state_dict()[f"average.{name}"])
    assert any(not torch.equal(kept[name], last[name]) for name in kept)
    plain = trainer(stage)
    plain.step()
    last = copy.deepcopy(plain.block.state_dict())
    for name, tensor in plain.finish().state_dict().items():
        assert torch.equal(tensor, last[name])


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_a_checkpoint_carries_everything(
    stage: StoreReader, tmp_path: Path, optimizer: str
) -> None:
    changes = {"ema": 0.7, "divergence": "hutchinson", "optimizer": optimizer}
    whole, half = trainer(stage, **changes), trainer(stage, **changes)
    for _ in range(3):
        whole.step()
        half.step()
    half.save(tmp_path / "checkpoint")
    resumed = trainer(stage, **changes)
    resumed.load(tmp_path / "checkpoint")
    assert resumed.done == 3
    for _ in range(3):
        assert whole.step() == resumed.step()
    expected = whole.finish().state_dict()
    for name, tensor in resumed.finish().state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_the_estimators_agree(stage: StoreReader) -> None:
    """Over a large batch Hutchinson's mean and the finite difference near the exact trace."""
    changes = {"batch_size": 1500}
    exact = trainer(stage, **changes)
    for _ in range(3):
        exact.step()
    weights = exact.block.state_dict()
    for name in ("hutchinson", "finite-difference"):
        other = trainer(stage, divergence=name, **changes)
        other.block.load_state_dict(weights)
        actual = other.step().terms["neg_log_det"]
        reference = trainer(stage, **changes)
        reference.block.load_state_dict(weights)
        assert actual == pytest.approx(reference.step().terms["neg_log_det"], rel=0.1)


@pytest.mark.parametrize("warm", [True, False])
def test_a_block_starts_where_the_one_before_ended(tmp_path: Path, warm: bool) -> None:
    # a learning rate that moves nothing keeps the initial weights
    def still(folder: Path, warm: bool) -> None:
        word = f"train.warm_start={str(warm).lower()}"
        config = tiny("train.lr=1e-12", "train.iterations=1", word)
        config = replace(config, velocity=replace(config.velocity, zero_init=False))
        train(config, folder, Accelerator(), quiet, resume=True, source=GaussianSource())

    still(tmp_path / "still", warm=False)
    fresh = load_blocks(tmp_path / "still", read_manifest(tmp_path / "still"))
    weights = [torch.cat([p.flatten() for p in block.parameters()]) for block in fresh]
    assert not torch.allclose(weights[0], weights[1], atol=1e-3)  # each has its own start
    still(tmp_path / "warm", warm)
    flow = load_blocks(tmp_path / "warm", read_manifest(tmp_path / "warm"))
    actual = [torch.cat([p.flatten() for p in block.parameters()]) for block in flow]
    expected = weights[0] if warm else weights[1]
    torch.testing.assert_close(actual[1], expected, rtol=0, atol=1e-9)


# ------------------------------------------------------------------------------------- failures


def test_data_that_are_not_finite_name_block_and_step(tmp_path: Path) -> None:
    one_epoch = ("train.batch_size=100", "train.iterations=30")
    with pytest.raises(JkoflowError, match=r"block 0 failed at step \d+|stage 0"):
        run(tmp_path / "run", *one_epoch, source=GaussianSource(bad=77))
    assert not (tmp_path / "run" / "flow.json").exists()


def test_a_step_that_diverges_names_block_and_step(tmp_path: Path) -> None:
    with pytest.raises(JkoflowError, match=r"block 0 failed at step \d+: .*; lower train\.lr"):
        run(tmp_path / "run", "train.lr=1e9", "train.iterations=50")
    assert not (tmp_path / "run" / "flow.json").exists()


def test_a_way_back_that_cannot_be_solved_names_block_and_step(stage: StoreReader) -> None:
    """The adjoint method integrates for the gradient, with its own limit of evaluations."""
    training = trainer(stage)
    training.block.solver = SolverConfig("dopri5", rtol=1e-7, atol=1e-7, adjoint=True)
    with torch.no_grad():
        for parameter in training.parameters:
            parameter.add_(torch.ones_like(parameter))
    forwards = training.objective.loss(0, torch.arange(training.recipe.batch_size)).nfe
    training.block.solver = replace(training.block.solver, max_evaluations=forwards)
    with pytest.raises(JkoflowError, match=r"block 0 failed at step 0: .*more than \d+ eval"):
        training.step()
    assert training.done == 0


def test_nan_weights_name_block_and_step(stage: StoreReader) -> None:
    training = trainer(stage)
    training.step()
    with torch.no_grad():
        training.parameters[0].fill_(float("nan"))
    with pytest.raises(JkoflowError, match="block 0 failed at step 1"):
        training.step()
    assert training.done == 1


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("train.iterations=0", r"train\.iterations is 0; expected at least 1"),
        ("train.batch_size=-1", r"train\.batch_size is -1; expected at least 1"),
        ("train.lr=0", r"train\.lr is 0\.0; expected above 0"),
        ("train.objective=gan", r"train.objective is 'gan'; expected jko or lfm or fm"),
        ("train.optimizer=sgd", r"train.optimizer is 'sgd'; expected adam or muon"),
        ("jko.divergence=guess", r"guess"),
        ("train.ema=1.0", r"EMA|ema"),
        ("velocity.kind=rnn", r"velocity.kind is 'rnn'; expected one of mlp"),
        ("velocity.kind=conv", r"conv"),
        ("latents.noise=-1", r"latents\.noise is -1\.0; expected at least 0"),
        ("latents.draws=0", r"latents\.draws is 0; expected at least 1"),
        ("jko.h=[0.1,-1]", r"jko\.h is \[0\.1, -1\.0\]"),
    ],
)
def test_bad_settings_leave_nothing_behind(tmp_path: Path, override: str, named: str) -> None:
    with pytest.raises((UserError, ValueError), match=named):
        run(tmp_path / "run", override)
    assert not (tmp_path / "run" / "config.yaml").exists(), "a run that cannot be trained"


class Scaled(GaussianSource):
    """Samples with a given standardisation."""

    def __init__(self, std: float) -> None:
        super().__init__()
        self.std = std

    def manifest(self, name: str) -> Manifest:
        standardisation = Standardisation(torch.zeros(2), torch.full((2,), self.std))
        return replace(super().manifest(name), standardisation=standardisation)


def test_latents_of_another_standardisation_are_an_error(tmp_path: Path) -> None:
    config = tiny("jko.h=[0.3]", "train.iterations=4")
    train(config, tmp_path / "run", Accelerator(), quiet, False, source=Scaled(1.5))
    again = train(config, tmp_path / "run", Accelerator(), quiet, True, source=Scaled(1.5))
    assert again.complete and again.trained == 0
    with pytest.raises(UserError, match="standardised otherwise"):
        train(config, tmp_path / "run", Accelerator(), quiet, True, source=Scaled(2.0))


def test_the_limit_of_a_training_is_in_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr("pipeline.training.block_loop.time", clock)
    limits, without = Limits(0.5), Limits(0)
    for seconds, reached in ((0, False), (29.9, False), (30.1, True)):
        now[0] = 100.0 + seconds
        assert limits.reached(1) == reached and not without.reached(1)
