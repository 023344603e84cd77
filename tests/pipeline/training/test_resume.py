"""Killed anywhere and resumed: the same bytes as a command that was never stopped."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.runs.directory import read_config
from pipeline.storage import seal
from pipeline.storage.atomic import TEMPORARY_PREFIX
from tests.pipeline.tiny import (
    World,
    child,
    make_world,
    python,
    run_child,
    say,
    write_pictures,
)

#: entries of flow.json that tell when, not what
CLOCKS = ("seconds", "time")


def without_clocks(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_clocks(v) for k, v in value.items() if k not in CLOCKS}
    return [without_clocks(v) for v in value] if isinstance(value, list) else value


def cache_bytes(world: World) -> dict[str, bytes]:
    (cache,) = world.caches()
    return {path.name: path.read_bytes() for path in cache.iterdir()}


def run_content(run: Path) -> dict[str, Any]:
    """Read everything in a run except clocks, TensorBoard's files, the seal and temporaries."""
    content: dict[str, Any] = {}
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run).as_posix()
        litter = path.name.startswith(TEMPORARY_PREFIX)
        if path.is_dir() or name.startswith(("tensorboard", seal.NAME)) or litter:
            continue
        if name == "flow.json":
            content[name] = without_clocks(json.loads(path.read_text()))
        elif name == "log.jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            content[name] = [without_clocks(row) for row in rows if "event" not in row]
        else:
            content[name] = path.read_bytes()
    return content


def assert_same(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert sorted(actual) == sorted(expected)
    different = [name for name in expected if actual[name] != expected[name]]
    assert not different


#: every step of a training leaves a checkpoint, so that a killed one loses little
OFTEN = {"train": {"checkpoint_seconds": 0.0}}


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("never"))
    config = world.config(**OFTEN)
    run_child("encode", "--config", config, env=world.environment)
    run_child("train", "--config", config, "--run", world.root / "run", env=world.environment)
    return world


@pytest.fixture
def again(never_stopped: World, tmp_path: Path) -> World:
    """The same pictures, autoencoder and configuration; an empty data root."""
    return World(never_stopped.root, never_stopped.settings, tmp_path / "home")


def until_done(world: World, arguments: list[str | Path], commits: int, seed: int) -> int:
    """Kill a command at random commits, before or after the rename; return the number of kills."""
    chosen = random.Random(seed)
    for kills in range(200):
        number, after = chosen.randint(1, commits), chosen.random() < 0.6
        process = child(arguments, world.environment, number, after)
        process.start()
        process.join()
        if process.exitcode == 0:
            return kills
        assert process.exitcode == -signal.SIGKILL
    raise AssertionError("killed 200 times and still not done")


def test_encode_killed_at_its_commits(never_stopped: World, again: World) -> None:
    arguments: list[str | Path] = ["encode", "--config", again.config(**OFTEN)]
    assert until_done(again, arguments, 2, seed=3) >= 3
    assert_same(cache_bytes(again), cache_bytes(never_stopped))


def test_train_killed_at_its_commits(never_stopped: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["train", "--config", never_stopped.config(**OFTEN), "--run", run, "--resume"]
    assert until_done(never_stopped, arguments, 10, seed=5) >= 5
    assert_same(run_content(run), run_content(never_stopped.root / "run"))


def test_train_killed_after_its_first_commit(never_stopped: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["train", "--config", never_stopped.config(**OFTEN), "--run", run, "--resume"]
    process = child(arguments, never_stopped.environment, die_at=1)
    process.start()
    process.join()
    assert sorted(path.name for path in run.iterdir()) == [seal.NAME, "config.yaml"]
    run_child(*arguments, env=never_stopped.environment)
    assert_same(run_content(run), run_content(never_stopped.root / "run"))


def kill_processes(
    world: World, arguments: list[str | Path], kills: int, seed: int, marker: Path, longest: float
) -> int:
    """SIGKILL `python -m pipeline …` at random moments after it has begun its work.

    Args:
        world: its environment.
        arguments: of the command.
        kills: how often.
        seed: of the moments.
        marker: the folder that is there once the work has begun.
        longest: seconds after that, at most.

    Returns:
        Kills that met a living process.
    """
    chosen, met = random.Random(seed), 0
    for _ in range(kills):
        process = python(*arguments, env=world.environment)
        while process.poll() is None and not any(marker.glob("*")):
            time.sleep(0.005)
        time.sleep(chosen.uniform(0, longest))
        met += process.poll() is None
        process.kill()
        process.communicate()
    process = python(*arguments, env=world.environment)
    _, said = process.communicate()
    assert process.returncode == 0, said
    return met


def test_a_killed_process_can_resume(never_stopped: World, again: World, tmp_path: Path) -> None:
    config, run = again.config(**OFTEN), tmp_path / "run"
    encode: list[str | Path] = ["encode", "--config", config]
    kill_processes(again, encode, 1, seed=0, marker=again.home / "latents", longest=0.1)
    assert_same(cache_bytes(again), cache_bytes(never_stopped))
    train: list[str | Path] = ["train", "--config", config, "--run", run, "--resume"]
    kill_processes(again, train, 1, seed=1, marker=run / "checkpoints", longest=0.5)
    assert_same(run_content(run), run_content(never_stopped.root / "run"))


@pytest.mark.slow
def test_twenty_processes_killed_at_random(tmp_path: Path) -> None:
    whole = make_world(tmp_path / "whole", train=200)
    changes = {"train": {"iterations": 150, "checkpoint_seconds": 0.0}, "latents": {"draws": 3}}
    config = whole.config(**changes)
    run_child("encode", "--config", config, env=whole.environment)
    run_child("train", "--config", config, "--run", whole.root / "run", env=whole.environment)
    killed = World(whole.root, whole.settings, tmp_path / "home")
    encode: list[str | Path] = ["encode", "--config", config]
    marker = killed.home / "latents"
    met = kill_processes(killed, encode, 8, seed=2, marker=marker, longest=0.3)
    run = tmp_path / "run"
    train: list[str | Path] = ["train", "--config", config, "--run", run, "--resume"]
    met += kill_processes(killed, train, 12, seed=3, marker=run, longest=4.0)
    assert met >= 10
    assert_same(cache_bytes(killed), cache_bytes(whole))
    assert_same(run_content(run), run_content(whole.root / "run"))


def test_temporaries_of_the_dead_are_swept(again: World) -> None:
    arguments: list[str | Path] = ["encode", "--config", again.config(**OFTEN)]
    process = child(arguments, again.environment, die_at=3, after=False)
    process.start()
    process.join()
    (cache,) = again.caches()
    left = [path.name.startswith(TEMPORARY_PREFIX) for path in cache.iterdir()]
    assert sum(left) == 1
    run_child(*arguments, env=again.environment)
    assert not any(path.name.startswith(TEMPORARY_PREFIX) for path in cache.iterdir())


def test_a_resumed_run_sweeps_too(never_stopped: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["train", "--config", never_stopped.config(**OFTEN), "--run", run, "--resume"]
    for number in (12, 2):  # a checkpoint, and what the resumed run writes first
        process = child(arguments, never_stopped.environment, die_at=number, after=False)
        process.start()
        process.join()
    assert list(run.rglob(f"{TEMPORARY_PREFIX}*"))
    run_child(*arguments, env=never_stopped.environment)
    assert not list(run.rglob(f"{TEMPORARY_PREFIX}*"))


def test_a_run_resumes_with_images_that_moved(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = world.config(**OFTEN), tmp_path / "run"
    assert say(capsys, "encode", "-c", config)[0] == 0
    assert say(capsys, "train", "-c", config, "-r", tmp_path / "whole")[0] == 0
    assert say(capsys, "train", "-c", config, "-r", run, "--max-minutes", "0.0001")[0] == 0
    moved = (world.root / "pictures").rename(tmp_path / "moved")
    resume = ["train", "-r", run, "--resume", "--set"]
    before = (run / "config.yaml").read_bytes()

    other = tmp_path / "other"
    write_pictures(other / "train", 40, seed=3)
    assert say(capsys, "encode", "-c", config, "--set", f"data.path={other}")[0] == 0
    code, _, last = say(capsys, *resume, f"data.path={other}")
    assert code == 2 and f"the data at {other} are not those that the run at {run}" in last
    assert (run / "config.yaml").read_bytes() == before

    assert say(capsys, *resume, f"data.path={moved}")[0] == 0
    assert read_config(run).data.path == str(moved)
    actual, expected = run_content(run), run_content(tmp_path / "whole")
    assert actual.pop("config.yaml") != expected.pop("config.yaml")
    assert_same(actual, expected)
