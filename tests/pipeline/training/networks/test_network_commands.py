"""Commands on networks: stopped, killed, at once, and before they are joined."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.runs.directory import read_manifest
from pipeline.runs.networks import WEIGHTS, network_folder
from pipeline.runs.run import load_blocks
from pipeline.runs.verify import verify
from pipeline.storage import seal
from tests.pipeline.tiny import World, child, make_world, run_child, say
from tests.pipeline.training.networks.small_networks import weights_of
from tests.pipeline.training.test_resume import assert_same, run_content, until_done


def configuration(world: World, **train: Any) -> str:
    recipe = {"objective": "fm", "checkpoint_seconds": 0.0, **train}
    return world.config(train=recipe, velocity={"nets": 2})


def words(world: World, run: str | Path) -> list[str | Path]:
    return ["train", "--config", configuration(world), "--run", world.root / run]


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


@pytest.fixture
def used(sequential: World, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setenv("JKOFLOW_HOME", str(sequential.home))
    return sequential


def content(run: Path) -> dict[str, Any]:
    """Everything in a run, but of its networks only the weights."""
    return {
        name: value
        for name, value in run_content(run).items()
        if not name.startswith("networks/") or name.endswith(WEIGHTS)
    }


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
