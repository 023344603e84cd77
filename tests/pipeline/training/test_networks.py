"""Networks that train alone and are joined, against those that are trained together."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
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
from pipeline.config.schema import Config
from pipeline.config.training import MatchingConfig, TrainConfig
from pipeline.errors import UserError
from pipeline.runs.directory import read_manifest
from pipeline.runs.networks import WEIGHTS, network_folder
from pipeline.runs.run import load_blocks
from pipeline.runs.verify import verify
from pipeline.runtime.rng import generator
from pipeline.storage import seal
from pipeline.training.block_trainer import BlockTrainer
from pipeline.training.networks.train_network import train_network
from pipeline.training.sources import SampleSource
from pipeline.training.train import Outcome, train
from tests.pipeline.gaussian_source import GaussianSource, quiet, tiny
from tests.pipeline.labelled_source import LabelledSource
from tests.pipeline.tiny import World, child, make_world, run_child, say
from tests.pipeline.training.test_resume import assert_same, run_content, until_done
from tests.ranks import Rank, mean_of

NETS = 3
SETTINGS = (
    "train.objective=fm", "velocity.kind=mlp", "velocity.width=8", "velocity.depth=1",
    f"velocity.nets={NETS}", "sampler.steps=6", "train.iterations=12", "train.lr=0.01",
    "train.ema=0.9", "train.log_every=4", "train.batch_size=20",
)  # fmt: skip


def settings(*overrides: str, clip: float = 0.0) -> Config:
    config = tiny(*SETTINGS, *overrides)
    return replace(config, train=replace(config.train, grad_clip=clip))


def alone(
    config: Config, run: Path, network: int, resume: bool = True, source: Any = None
) -> bool:
    source = source or GaussianSource(count=300)
    return train_network(config, run, Accelerator(), quiet, resume, network, source)


def together(config: Config, run: Path, source: SampleSource | None = None) -> Outcome:
    source = source or GaussianSource(count=300)
    return train(config, run, Accelerator(), quiet, False, source)


def weights_of(run: Path) -> bytes:
    return (run / "blocks" / "block-00.safetensors").read_bytes()


def loss_rows(run: Path) -> list[dict[str, Any]]:
    lines = (run / "log.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "total" in row and "event" not in row]


# ------------------------------------------------------------- the same as together


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("train.optimizer=muon",),
        ("train.ema=0",),
        ("matching.times=logit-normal", "matching.coupling=ot"),
        ("matching.interpolant=trigonometric", "train.precision=bf16"),
        ("train.micro_batch=7",),
        ("train.batch_size=2",),  # every batch leaves a network without samples
        ("velocity.classes=2", "velocity.class_dropout=0.3"),
    ],
    ids=["adam", "muon", "last", "ot", "bf16", "micro", "few", "classes"],
)
def test_joined_networks_have_the_bytes_of_networks_trained_together(
    tmp_path: Path, changes: tuple[str, ...]
) -> None:
    """Without clipping; in an order that is not that of the times."""
    config = settings(*changes)
    labelled = any(change.startswith("velocity.classes") for change in changes)
    source: Any = LabelledSource(300) if labelled else GaussianSource(count=300)
    assert together(config, tmp_path / "together", source).complete
    for network in (2, 0, 1):
        assert alone(config, tmp_path / "alone", network, source=source)
    assert not (tmp_path / "alone" / "blocks").exists()
    assert together(config, tmp_path / "alone", source) == Outcome(1, True, 1)
    assert weights_of(tmp_path / "alone") == weights_of(tmp_path / "together")
    one, other = (read_manifest(tmp_path / name).blocks[0] for name in ("alone", "together"))
    assert replace(one, seconds=0) == replace(other, seconds=0)
    rows, wanted = (loss_rows(tmp_path / name) for name in ("alone", "together"))
    assert [row["step"] for row in rows] == [row["step"] for row in wanted] == [4, 8, 12]
    for row, other_row in zip(rows, wanted, strict=True):
        assert row["total"] == pytest.approx(other_row["total"], rel=1e-5)


def test_networks_start_from_those_of_another_run(tmp_path: Path) -> None:
    single = settings("velocity.nets=1")
    assert together(single, tmp_path / "single").complete
    config = settings()
    config = replace(config, train=replace(config.train, init_from=str(tmp_path / "single")))
    assert together(config, tmp_path / "together").complete
    for network in range(NETS):
        assert alone(config, tmp_path / "alone", network)
    assert together(config, tmp_path / "alone").complete
    assert weights_of(tmp_path / "alone") == weights_of(tmp_path / "together")
    assert read_manifest(tmp_path / "alone").init_from is not None


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


# ------------------------------------------------------- stopped, killed, and at once


@pytest.fixture(scope="module")
def sequential(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Two networks, trained alone one after the other and joined, through the commands."""
    world = make_world(tmp_path_factory.mktemp("networks"))
    run_child("encode", "--config", configuration(world), env=world.environment)
    for network in ("0", "1"):
        run_child(*words(world, "run"), "--network", network, env=world.environment)
    shutil.copytree(world.root / "run", world.root / "unjoined")
    run_child(*words(world, "run"), env=world.environment)
    return world


def content(run: Path) -> dict[str, Any]:
    """Everything in a run, but of its networks only the weights."""
    return {
        name: value
        for name, value in run_content(run).items()
        if not name.startswith("networks/") or name.endswith(WEIGHTS)
    }


def configuration(world: World, **train: Any) -> str:
    recipe = {"objective": "fm", "checkpoint_seconds": 0.0, **train}
    return world.config(train=recipe, velocity={"nets": 2})


def words(world: World, run: str | Path) -> list[str | Path]:
    return ["train", "--config", configuration(world), "--run", world.root / run]


@pytest.fixture
def used(sequential: World, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setenv("JKOFLOW_HOME", str(sequential.home))
    return sequential


def test_a_joined_run_is_a_run(used: World, tmp_path: Path, capsys: Any) -> None:
    run = Path(shutil.copytree(used.root / "run", tmp_path / "run"))
    assert verify(run) == []
    manifest = read_manifest(run)
    assert manifest.complete and len(load_blocks(run, manifest)) == 1
    assert list((run / "previews").glob("*-step-00000006.png"))
    code, out, error = say(capsys, "generate", "--run", run, "-n", "2")
    assert code == 0 and out, error
    code, _, error = say(capsys, *words(used, run), "--resume")
    assert (code, "1 blocks, 0 trained now: finished" in error) == (0, True), error
    code, _, error = say(capsys, *words(used, run), "--resume", "--network", "1")
    assert (code, "network 1: finished; join all" in error) == (0, True), error


def test_a_killed_network_resumes_to_the_same_bytes(sequential: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for network in ("0", "1"):
        arguments = [*words(sequential, run), "--network", network, "--resume"]
        assert until_done(sequential, arguments, 8, seed=int(network)) >= 2
    arguments = [*words(sequential, run), "--resume"]
    assert until_done(sequential, arguments, 8, seed=2) >= 1
    assert_same(content(run), content(sequential.root / "run"))


def test_networks_train_at_the_same_time(sequential: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    jobs = [
        child([*words(sequential, run), "--network", network], sequential.environment)
        for network in ("0", "1")
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0, 0]
    run_child(*words(sequential, run), env=sequential.environment)
    assert_same(content(run), content(sequential.root / "run"))


def test_a_network_stops_in_time(used: World, tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    one = [*words(used, run), "--network", "0"]
    code, out, error = say(capsys, *one, "--max-minutes", "1e-9")
    assert (code, out.strip()) == (0, str(run)), error
    assert error == "network 0: stopped in time; continue with --resume"
    code, _, error = say(capsys, *one)
    assert code == 2 and f"network 0 of the run at {run} has begun already" in error
    code, _, error = say(capsys, *one, "--resume")
    assert (code, error) == (0, "network 0: finished; 1 of 2 are left")
    code, _, error = say(capsys, "train", "--run", run, "--resume", "--network", "1")
    assert code == 0 and f"join all by `jkoflow train --run {run} --resume`" in error
    code, _, error = say(capsys, "train", "--run", run, "--resume")
    assert code == 0 and "1 blocks, 1 trained now: finished" in error
    assert weights_of(run) == weights_of(used.root / "run")


def test_a_dry_run_says_what_is_left(used: World, tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    one = [*words(used, run), "--network", "1"]
    assert say(capsys, *one)[0] == 0
    assert "is finished" in say(capsys, *one, "--dry-run")[1]
    other = say(capsys, *words(used, run), "--network", "0", "--dry-run")[1]
    assert "train network 0 of 2 alone" in other and "is finished" not in other
    whole = say(capsys, *words(used, run), "--dry-run")[1]
    assert "join 2 networks to a block, 1 of them" in whole


# --------------------------------------------------------------------------- refused


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


def test_missing_networks_are_named(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert alone(settings(), run, 1)
    with pytest.raises(UserError, match="networks 0 and 2 of the run at .* are not finished"):
        together(settings(), run)
    assert not alone(settings("train.max_minutes=1e-9"), run, 0)  # it has begun
    with pytest.raises(UserError, match=f"networks 0 and 2 .* --run {run} --resume --network 0"):
        together(settings(), run)
    assert alone(settings(), run, 0) and alone(settings(), run, 2)
    shutil.rmtree(network_folder(run, 1))
    with pytest.raises(UserError, match="network 1 of the run at .* is not finished"):
        together(settings(), run)
    assert alone(settings(), run, 1)
    assert together(settings(), run).complete


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("train.lr=0.02",), r"train.lr=0.02 \(the run: 0.01\)"),
        (("train.iterations=8",), r"train.iterations=8 \(the run: 12\)"),
        (("matching.times=logit-normal",), "matching.times=logit-normal"),
        (("latents.noise=0",), "other samples"),
    ],
)
def test_networks_of_another_training_are_not_joined(
    tmp_path: Path, changes: tuple[str, ...], message: str
) -> None:
    """The folder of a network may come from a machine without a common disk."""
    run, other = tmp_path / "run", tmp_path / "other"
    for network in (0, 2):
        assert alone(settings(), run, network)
    samples = GaussianSource(count=299 if "latents.noise=0" in changes else 300)
    assert alone(settings(*changes), other, 1, source=samples)
    shutil.copytree(network_folder(other, 1), network_folder(run, 1))
    with pytest.raises(UserError, match=f"network 1 of the run at .* was trained with {message}"):
        together(settings(), run)
    with pytest.raises(UserError, match="expected one training for all"):
        alone(settings(), run, 1)
    shutil.rmtree(network_folder(run, 1))
    shutil.copytree(network_folder(other, 1), network_folder(run, 0), dirs_exist_ok=True)
    with pytest.raises(UserError, match="is of network 1; expected network 0"):
        together(settings(), run)


def test_a_network_with_other_settings_does_not_join_a_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert alone(settings(), run, 0)
    with pytest.raises(UserError, match="was started with train.lr=0.01"):
        alone(settings("train.lr=0.02"), run, 1)
    for iterations in (8, 16):
        with pytest.raises(UserError, match=f"train.iterations is {iterations}; expected 12"):
            alone(settings(f"train.iterations={iterations}"), run, 1)
    assert alone(settings("train.log_every=2"), run, 1)  # it decides no weights


@pytest.mark.parametrize("name", ["network.safetensors", "network.json"])
def test_a_damaged_network_is_found(used: World, tmp_path: Path, capsys: Any, name: str) -> None:
    run = Path(shutil.copytree(used.root / "unjoined", tmp_path / "run"))
    path = network_folder(run, 1) / name
    data = path.read_bytes()
    path.write_bytes(data[:-9] + b"\0" + data[-8:])
    code, _, error = say(capsys, *words(used, run), "--resume")
    assert code == 2 and error.startswith("error: ") and "is damaged" in error
    (fault,) = verify(run)
    assert fault.path == path and "--resume --network 1`" in fault.remedy
    path.unlink()
    if name == "network.safetensors":
        (fault,) = verify(run)
        assert fault.problem == "missing"
    shutil.rmtree(path.parent)
    assert say(capsys, *words(used, run), "--resume", "--network", "1")[0] == 0
    assert say(capsys, *words(used, run), "--resume")[0] == 0
    assert weights_of(run) == weights_of(used.root / "run")


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "-n", "2"), ("evaluate", "-n", "2"), ("report",), ("train", "--resume"),
        ("evaluate", "-n", "2", "--dry-run"), ("train", "--measure-noise"), ("likelihood",),
        ("export", "--out", "OUT"), ("invert", "--images", "IN"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_commands_on_networks_without_a_block_say_one_sentence(
    used: World, tmp_path: Path, capsys: Any, command: tuple[str, ...]
) -> None:
    run = Path(shutil.copytree(used.root / "unjoined", tmp_path / "run"))
    shutil.rmtree(network_folder(run, 1))
    code, _, error = say(capsys, *command, "--run", run)
    assert code == 2 and error.startswith("error: "), error
    assert str(run) in error or "option" in error.lower()


def test_options_that_do_not_fit_are_refused(used: World, tmp_path: Path, capsys: Any) -> None:
    one = [*words(used, tmp_path / "run"), "--network", "0"]
    for option in (["--add-blocks", "1"], ["--measure-noise"]):
        code, _, error = say(capsys, *one, *option)
        assert code == 2 and f"{option[0]} has no meaning for one network" in error
    code, _, error = say(capsys, "train", "--run", tmp_path / "run", "--network", "0")
    assert code == 2 and "--config is missing" in error
    assert not (tmp_path / "run").exists() and not list(tmp_path.glob(f"*{seal.NAME}"))
