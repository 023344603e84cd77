"""Snapshots of flow matching, FID against samples seen, and bfloat16."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from autoencoders.base import to_uint8
from flows.autoguidance import autoguide
from pipeline.errors import UserError
from pipeline.runs.directory import read_manifest
from pipeline.runs.run import load_blocks, open_run
from pipeline.runs.snapshots import Snapshot, add_snapshot, open_snapshot, snapshots_of
from pipeline.runtime.rng import generator
from pipeline.training.train import train
from tests.pipeline.drawing import images
from tests.pipeline.evaluation.test_evaluator import distance
from tests.pipeline.gaussian_source import GaussianSource, quiet, tiny
from tests.pipeline.glance import stand_in
from tests.pipeline.killing import assert_same_content, kill_at
from tests.pipeline.tiny import World, pictures, say

FM = ("train.objective=fm", "train.ema=0.9", "train.iterations=6", "train.batch_size=32",
      "train.checkpoint_seconds=0")  # fmt: skip
KEPT = (*FM, "fm.snapshot_every=2")


def run(folder: Path, *overrides: str) -> None:
    train(tiny(*overrides), folder, Accelerator(cpu=True), quiet, True, GaussianSource())


def test_snapshots_are_the_averaged_weights(tmp_path: Path) -> None:
    """The last snapshot is the block; an earlier one is that of a shorter training."""
    run(tmp_path / "run", *KEPT)
    listed = snapshots_of(tmp_path / "run")
    assert [(row.step, row.seen) for row in listed] == [(2, 64), (4, 128), (6, 192)]
    (block,) = read_manifest(tmp_path / "run").blocks
    assert listed[-1].sha256 == block.sha256 != listed[0].sha256
    run(tmp_path / "flat", *FM, "train.lr_final=1")
    run(tmp_path / "kept", *KEPT, "train.lr_final=1")
    run(tmp_path / "short", *FM, "train.lr_final=1", "train.iterations=4")
    (short,) = read_manifest(tmp_path / "short").blocks
    assert snapshots_of(tmp_path / "kept")[1].sha256 == short.sha256
    whole = [read_manifest(tmp_path / name).blocks[0].sha256 for name in ("flat", "kept")]
    assert whole[0] == whole[1]  # keeping them changes nothing
    assert not (tmp_path / "flat" / "snapshots").exists()


def _resume(folder: str) -> None:
    run(Path(folder), *KEPT)


def test_a_killed_training_resumes_to_the_same_snapshots(tmp_path: Path) -> None:
    run(tmp_path / "whole", *KEPT)
    kill_at((5, 9, 10), _resume, str(tmp_path / "killed"))
    run(tmp_path / "killed", *KEPT)
    assert_same_content(tmp_path / "killed", tmp_path / "whole")
    whole, killed = snapshots_of(tmp_path / "whole"), snapshots_of(tmp_path / "killed")
    assert [row.sha256 for row in killed] == [row.sha256 for row in whole]


@pytest.mark.slow
def test_half_precision_trains_nearly_the_same_field(tmp_path: Path) -> None:
    curved = ("velocity.kind=resmlp", "velocity.width=32", "train.iterations=60", "train.lr=0.01")
    fields = []
    for precision in ("fp32", "bf16"):
        folder = tmp_path / precision
        run(folder, *FM, *curved, f"train.precision={precision}")
        stored = load_file(folder / "blocks" / "block-00.safetensors")
        assert {x.dtype for x in stored.values()} == {torch.float32}
        (block,) = load_blocks(folder, read_manifest(folder))
        z = torch.randn((256, 2), generator=torch.Generator().manual_seed(0))
        fields.append(block.velocity(torch.tensor(0.5), z))
    full, half = fields
    assert 0 < (full - half).square().mean() < 0.01 * full.square().mean()


def kept(world: World) -> str:
    train = {"objective": "fm", "iterations": 40, "batch_size": 8}
    return world.config("fm", train=train, fm={"snapshot_every": 20})


def test_a_run_is_guided_by_what_it_was(
    trained: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, folder = kept(trained), tmp_path / "run"
    assert say(capsys, "train", "-c", config, "-r", folder)[0] == 0
    opened = open_run(folder)
    then = open_snapshot(folder, 20)
    assert then.fingerprint != opened.fingerprint
    assert open_snapshot(folder, 40).fingerprint == opened.fingerprint
    guided = images(opened, guide=f"{folder}@20", guidance=2.0)
    noise = [torch.randn(n, 2, 3, 3, generator=generator(0, "sample", k))
             for k, n in enumerate((4, 4, 2))]  # fmt: skip
    led = autoguide(opened.flow, then.flow, 2.0)
    solver = opened.config.sampler.of_block(0)
    z = opened.standardisation.undo(led.decode(torch.cat(noise), solver))
    with torch.inference_mode():
        by_hand = to_uint8(opened.autoencoder().decode(z))
    assert (guided.int() - by_hand.int()).abs().max() <= 1
    assert not torch.equal(guided, images(then))
    words = ("export", "-r", folder, "--guide", f"{folder}@20", "--guidance", "2", "--out")
    assert say(capsys, *words, tmp_path / "out")[0] == 0
    assert "| guide | tiny@20, " in (tmp_path / "out" / "CARD.md").read_text()
    assert say(capsys, "report", "-r", tmp_path / "out" / "guide")[0] == 0
    shutil.rmtree(folder)
    again = images(open_run(tmp_path / "out"))
    assert (guided.int() - again.int()).abs().max() <= 1
    code, _, error = say(capsys, "generate", "-r", tmp_path / "out", "--guide",
                         f"{tmp_path / 'out'}@7", "--guidance", "2")  # fmt: skip
    assert code == 2 and "has no snapshot of step 7; expected a run with snapshots" in error


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (("train.precision=fp16",), "train.precision is 'fp16'; expected fp32 or bf16"),
        (
            ("train.precision=bf16", "jko.divergence=finite-difference"),
            r"train\.precision=bf16 applies to train.objective=lfm or fm",
        ),
        (("fm.snapshot_every=5",), "applies to train.objective=fm"),
        (("train.objective=lfm", "fm.snapshot_every=5"), "applies to train.objective=fm"),
        (("train.objective=fm", "fm.snapshot_every=-1"), "is -1; expected at least 0"),
    ],
)
def test_invalid_settings_are_errors_before_anything_is_written(
    tmp_path: Path, overrides: tuple[str, ...], named: str
) -> None:
    with pytest.raises(UserError, match=named):
        run(tmp_path / "run", *overrides)
    assert not (tmp_path / "run").exists()


def test_the_curve_of_fid_against_samples_seen(
    trained: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stand_in(monkeypatch)
    folder, reference = tmp_path / "run", trained.root / "pictures" / "train"
    config = kept(trained)
    assert say(capsys, "train", "--config", config, "--run", folder)[0] == 0
    words = ["evaluate", "--run", folder, "-n", "12", "--reference", reference, "--curve"]
    code, out, last = say(capsys, *words)
    assert code == 0 and out.strip() == str(folder / "curve.json"), last
    curve = json.loads((folder / "curve.json").read_text())
    assert (curve["n"], curve["seed"], curve["reference"]) == (12, 0, str(reference))
    assert [(row["step"], row["seen"]) for row in curve["rows"]] == [(20, 160), (40, 320)]
    assert curve["rows"][0]["fid"] != curve["rows"][1]["fid"]
    opened = open_run(folder)
    real = pictures(40, seed=1)[:, None]
    by_hand = distance(images(opened, n=12).numpy(), real)
    assert curve["rows"][1]["fid"] == pytest.approx(by_hand, rel=1e-4)
    assert (folder / "samples" / "curve.png").stat().st_size > 1000
    assert not (folder / "metrics.json").exists()
    sampler = opened.config.sampler
    assert curve["solver"] == {
        "method": sampler.method, "steps": sampler.steps
    }  # fmt: skip
    assert curve["sampling"]["guidance"] == 1
    code, _, last = say(capsys, *words, "--nfe-study", "12")
    assert code == 2 and "ask for one at a time" in last
    shutil.rmtree(folder / "snapshots")
    code, _, last = say(capsys, *words)
    assert code == 2 and "kept no weights during training" in last
    words[2] = trained.root / "run"
    code, _, last = say(capsys, *words)
    assert code == 2 and "needs a flow of one block" in last and "has 3;" in last


def test_later_snapshots_of_a_killed_training_are_dropped(tmp_path: Path) -> None:
    for step in (2, 4, 6, 4):
        add_snapshot(tmp_path, Snapshot(f"{step}.safetensors", "0" * 64, step, step, 0.0))
    assert [row.step for row in snapshots_of(tmp_path)] == [2, 4]
