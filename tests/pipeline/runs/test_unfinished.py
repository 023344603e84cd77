"""Unfinished runs: the averaged weights of the block in training, and lower iterations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from pipeline.cli import main
from pipeline.errors import UserError
from pipeline.runs.directory import read_manifest
from pipeline.runs.run import load_blocks, open_run
from pipeline.runs.snapshots import snapshots_of
from pipeline.runs.unfinished import averaged_weights, open_latest
from pipeline.runtime import signals
from pipeline.training.train import Outcome, train
from tests.pipeline.gaussian_source import GaussianSource, quiet, tiny
from tests.pipeline.glance import stand_in
from tests.pipeline.tiny import World, run_child, say

FM = ("train.objective=fm", "train.ema=0.9", "train.iterations=6", "train.batch_size=32",
      "fm.snapshot_every=2")  # fmt: skip


def run(folder: Path, *overrides: str) -> Outcome:
    return train(tiny(*overrides), folder, Accelerator(cpu=True), quiet, True, GaussianSource())


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Stop the training in its n-th step from now on; an empty list stops nothing."""
    left: list[int] = []

    def pending() -> bool:
        if left:
            left[0] -= 1
        return bool(left) and left[0] == 0

    monkeypatch.setattr(signals, "pending", pending)
    return left


def test_the_block_in_training_has_its_averaged_weights(
    tmp_path: Path, stop_at: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    stop_at.append(4)
    assert not run(tmp_path, *FM).complete
    assert "block 0: saved at step 4 of 6" in capsys.readouterr().err
    opened = open_latest(tmp_path)
    assert opened.training is not None
    assert (opened.training.step, opened.training.iterations) == (4, 6)
    (row,), snapshot = opened.manifest.blocks, snapshots_of(tmp_path)[1]
    assert (row.sha256, row.iterations, snapshot.step) == (snapshot.sha256, 4, 4)
    with pytest.raises(UserError, match="no finished block yet"):
        open_run(tmp_path)
    stop_at.clear()
    assert run(tmp_path, *FM).complete
    finished = open_latest(tmp_path)
    assert finished.training is None and finished.manifest.blocks[0].sha256 != row.sha256


def test_finished_blocks_come_before_it(tmp_path: Path, stop_at: list[int]) -> None:
    few = ("train.iterations=5", "train.ema=0.9")
    stop_at.append(5 + 3)
    assert run(tmp_path, *few).blocks == 1
    opened = open_latest(tmp_path)
    assert opened.training is not None and opened.training.index == 1
    assert opened.training.sentence(tmp_path).endswith("weights of step 3 of 5")
    first = load_blocks(tmp_path, read_manifest(tmp_path))
    assert len(first) == 1 and len(opened.flow) == 2
    assert opened.manifest.blocks[1].h == pytest.approx(0.3)
    z = torch.randn(5, 2)
    assert torch.equal(opened.flow[:1].encode(z), first.encode(z))
    assert not torch.equal(opened.flow.encode(z), first.encode(z))
    assert open_latest(tmp_path, blocks=1).training is None


def test_lower_iterations_end_a_block(tmp_path: Path, stop_at: list[int]) -> None:
    stop_at.append(4)
    run(tmp_path, *FM)
    averaged = open_latest(tmp_path).manifest.blocks[0].sha256
    stop_at.clear()
    with pytest.raises(UserError, match=r"train.iterations=6 \(now 7\)"):
        run(tmp_path, *FM, "train.iterations=7")
    assert run(tmp_path, *FM, "train.iterations=3").complete
    (row,) = read_manifest(tmp_path).blocks
    assert (row.iterations, row.sha256) == (4, averaged)


def test_later_blocks_take_lower_iterations(tmp_path: Path, stop_at: list[int]) -> None:
    stop_at.append(5 + 1)
    run(tmp_path, "train.iterations=5")
    stop_at.clear()
    assert run(tmp_path, "train.iterations=[5,4,3]").complete
    manifest = read_manifest(tmp_path)
    assert [row.iterations for row in manifest.blocks] == [5, 4, 3]
    assert manifest.current.recipe["iterations"] == [5, 4, 3]


def test_generate_and_evaluate_say_so(
    capsys: pytest.CaptureFixture[str],
    trained: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The commands name the block and the step; `--iterations` finishes the run."""
    stand_in(monkeypatch)
    folder = tmp_path / "run"
    config = trained.config("unfinished", train={"preview_every": 0})
    limit = ("--max-minutes", "0.000001")
    run_child("train", "--config", config, "--run", folder, *limit, env=trained.environment)
    words = ["generate", "--run", folder, "-n", "4"]
    assert main.main([str(word) for word in words]) == 0
    line = f"the run at {folder} is unfinished; block 0 has its averaged weights of step 1 of 6"
    assert line in capsys.readouterr().err and (folder / "samples" / "grid.png").is_file()
    reference = trained.root / "pictures" / "test"
    code, _, last = say(
        capsys, "evaluate", "--run", folder, "--reference", reference, "--set", "evaluate.nll=0",
        "--set", "evaluate.floor=false",
    )  # fmt: skip
    assert code == 0, last
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["unfinished"] == {"index": 0, "step": 1, "iterations": 6}
    code, _, last = say(capsys, "train", "--run", folder, "--resume", "--iterations", "2")
    assert code == 0, last
    assert {row.iterations for row in read_manifest(folder).blocks} == {2}


def test_a_stopped_block_has_its_last_sound_weights() -> None:
    state = {"block": {"w": 1}, "average": {"average.w": 2, "updates": 9}, "sound": {"w": 3}}
    assert averaged_weights({**state, "stopped": True}) == {"w": 3}
    assert averaged_weights({**state, "stopped": False}) == {"w": 2}
    assert averaged_weights({**state, "stopped": True, "sound": None}) == {"w": 2}
