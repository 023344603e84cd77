"""`torchrun` on two processes: the same cache, and the same flow up to rounding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from flows.solving.solver import SolverConfig
from flows.spec import BlockSpec, build_block
from pipeline.runs.directory import read_manifest
from pipeline.runtime.rng import generator
from pipeline.training.train import train
from tests.pipeline.gaussian_source import GaussianSource, quiet
from tests.pipeline.tiny import ROOT, World, make_world, run_child
from tests.processes import run_job, two_networks


def launch(world: World, *arguments: str | Path) -> str:
    """Run a command on two processes; returns what they said."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        "-m", "pipeline", *map(str, arguments),
    ]  # fmt: skip
    done = subprocess.run(
        command, env={**os.environ, **world.environment}, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("alone"))
    config = world.config()
    run_child("encode", "--config", config, env=world.environment)
    run_child("train", "--config", config, "--run", world.root / "run", env=world.environment)
    return world


def test_encode_gives_the_same_bytes(alone: World, tmp_path: Path) -> None:
    pair = World(alone.root, alone.settings, tmp_path / "home")
    out = launch(pair, "encode", "--config", pair.config())
    (expected,), (actual,) = alone.caches(), pair.caches()
    assert out.split() == [str(actual)]  # the main process alone speaks
    assert {path.name for path in actual.iterdir()} == {path.name for path in expected.iterdir()}
    for path in expected.iterdir():
        assert (actual / path.name).read_bytes() == path.read_bytes(), path.name


def test_train_agrees_up_to_rounding(alone: World, tmp_path: Path) -> None:
    """Both train on the same batches, but the gradient is a mean of two means.

    Adam divides by the gradient's own size, so that a rounding error of a tiny gradient counts
    as much as that of a large one; after 18 steps of lr 1e-3 the weights differ by far less
    than one step.
    """
    run = tmp_path / "run"
    launch(alone, "train", "--config", alone.config(), "-r", run)
    expected, actual = read_manifest(alone.root / "run"), read_manifest(run)
    assert actual.complete and len(actual.blocks) == 3
    assert [row.spec for row in actual.blocks] == [row.spec for row in expected.blocks]
    moved = 0.0
    for mine, theirs in zip(actual.blocks, expected.blocks, strict=True):
        a, b = load_file(run / mine.file), load_file(alone.root / "run" / theirs.file)
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=2e-5)
        moved = max(moved, *(float(tensor.abs().max()) for tensor in a.values()))
        assert mine.movement == pytest.approx(theirs.movement, rel=1e-3)
        assert mine.ter == pytest.approx(theirs.ter, rel=1e-3)
    assert moved > 1e-2
    steps = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    rows = [(row["block"], row["step"]) for row in steps if "event" not in row]
    assert rows == [(block, step) for block in range(3) for step in (2, 4, 6)]


UNSOLVABLE = ("unsolvable", "JkoflowError", ["block 0 failed at step 0", "could not be solved"])
IMAGES = ("images", "SolveError", ["could not be solved at t = 0.5: it is not finite"])
FEATURES = ("features", "UserError", ["the images of shard 1 are not there"])
AUTOENCODER = ("autoencoder", "FloatingPointError", ["loss is nan at step 0"])


@pytest.mark.parametrize(
    ("job", "kind", "words"),
    [
        pytest.param(*UNSOLVABLE, marks=pytest.mark.slow),
        ("infinite", "JkoflowError", ["block 0 failed at step 0", "the loss is inf"]),
        ("stage", "UserError", ["1 of the training samples", "the first of them sample 5"]),
        pytest.param(*IMAGES, marks=pytest.mark.slow),
        pytest.param(*FEATURES, marks=pytest.mark.slow),
        pytest.param(*AUTOENCODER, marks=pytest.mark.slow),
    ],
)
def test_an_error_of_one_rank_is_raised_on_all(
    tmp_path: Path, job: str, kind: str, words: list[str]
) -> None:
    """None is left waiting for the others, and all say the same."""
    seen = run_job(job, tmp_path)
    assert seen[0] == seen[1]
    assert seen[0] is not None and seen[0][0] == kind
    assert all(word in seen[0][1] for word in words), seen


@pytest.mark.parametrize(
    ("job", "outcome"),
    [
        ("first clock", [0, False]),
        pytest.param("second clock", [3, True], marks=pytest.mark.slow),
    ],
)
def test_rank_0_decides_when_all_ranks_stop(tmp_path: Path, job: str, outcome: list[Any]) -> None:
    """None is left in a step that another does not take."""
    assert run_job(job, tmp_path) == [outcome, outcome]


@pytest.mark.slow
def test_networks_sharded_over_ranks_equal_those_of_one_rank(tmp_path: Path) -> None:
    """With checkpoints, which any number of processes may go on from."""
    source = GaussianSource(count=64)
    for name in ("alone", "stopped"):  # the second goes on where two processes stopped
        (tmp_path / name).mkdir()
        if name == "stopped":
            assert run_job("networks, halted", tmp_path / name) == [False, False]
        done = train(two_networks(), tmp_path / name / "run", Accelerator(), quiet, True, source)
        assert done.complete
    (tmp_path / "pair").mkdir()
    assert run_job("networks", tmp_path / "pair") == [True, True]
    files = ("blocks/block-00.safetensors", "snapshots/step-00000005.safetensors")
    for file in files:
        expected = load_file(tmp_path / "alone" / "run" / file)
        spec = BlockSpec(two_networks().velocity, SolverConfig("rk4", 4))
        first = build_block(spec, (2,), generator(0, "weights", 0)).state_dict()
        assert max(float((expected[key] - first[key]).abs().max()) for key in first) > 0.02
        for name in ("stopped", "pair"):
            actual = load_file(tmp_path / name / "run" / file)
            for key in expected:
                torch.testing.assert_close(actual[key], expected[key], rtol=1e-3, atol=1e-5)
    logs = [(tmp_path / name / "run" / "log.jsonl").read_text() for name in ("alone", "pair")]
    ours, theirs = ([json.loads(line) for line in log.splitlines()] for log in logs)
    steps = [[row for row in log if "event" not in row] for log in (ours, theirs)]
    assert len(steps[0]) > 1
    for mine, other in zip(*steps, strict=True):
        assert mine["total"] == pytest.approx(other["total"], rel=1e-4)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_a_step_without_error_raises_on_no_rank(tmp_path: Path) -> None:
    assert run_job("ordinary", tmp_path) == [None, None]


def test_a_rank_exits_with_its_code_and_output() -> None:
    """Without the interpreter's own end, so what Python holds back must be written before."""
    words = (
        "import atexit, pipeline.__main__ as m; atexit.register(print, 'taken down');"
        "print('said', end=''); m.leave({code})"
    )
    for ranks, code, said in (("2", 3, "said"), ("2", 0, "said"), ("1", 3, "saidtaken down\n")):
        done = subprocess.run(
            [sys.executable, "-c", words.format(code=code)],
            env={**os.environ, "WORLD_SIZE": ranks}, cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (code, said), done.stderr
