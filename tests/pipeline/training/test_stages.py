"""A stage has the samples that later blocks draw, with their labels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from flows.networks.condition import Condition
from pipeline.runs.directory import read_config, read_manifest
from pipeline.runs.run import load_blocks
from pipeline.storage import atomic
from pipeline.storage.shards.opening import open_store
from pipeline.training import stages
from pipeline.training.stages import stage_folder
from pipeline.training.train import restore_stages, train
from tests.pipeline.gaussian_source import OBJECTIVES, GaussianSource, quiet, tiny
from tests.pipeline.labelled_source import LabelledSource

SHORT = ("train.iterations=[4,2,3]", "train.batch_size=64", "velocity.classes=2")
COUNT, DRAWN = 1200, 3 * 64


@pytest.fixture
def least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "_LEAST", 100)


def run(folder: Path, *overrides: str) -> None:
    config = tiny(*OBJECTIVES["jko"], *SHORT, *overrides)
    train(config, folder, Accelerator(), quiet, resume=True, source=LabelledSource(COUNT))


def test_only_samples_that_are_drawn_are_pushed(least: None, tmp_path: Path) -> None:
    run(tmp_path)
    first, second, third = (open_store(stage_folder(tmp_path, k), "stage") for k in range(3))
    assert [len(first), len(second), len(third)] == [COUNT, DRAWN, DRAWN]
    flow = load_blocks(tmp_path, read_manifest(tmp_path))
    labels = first.field("labels")
    block, solver = flow[0], tiny().sampler.of_block(0)
    moved = block.transport(first.field("z"), solver=solver, condition=Condition(labels)).z
    z, chosen = second.field("z"), second.field("labels")
    distance = torch.cdist(z.double(), moved.double())
    nearest = distance.argmin(dim=1)
    assert float(distance.min(dim=1).values.max()) < 1e-5
    assert len(nearest.unique()) == DRAWN and torch.equal(labels[nearest], chosen)
    # the choice is random: not the first samples, and both clusters by their share
    assert nearest.max() > COUNT - 100 and 0.6 < float(chosen.double().mean()) < 0.9
    movement = (z - first.field("z")[nearest]).double().square().sum(dim=1).mean()
    row = read_manifest(tmp_path).blocks[0]
    assert row.movement == pytest.approx(float(movement) ** 0.5, rel=1e-4)


def test_a_finished_stage_is_kept_when_more_is_drawn(least: None, tmp_path: Path) -> None:
    rule = ("jko.h=null", "jko.h0=0.4", "schedule.rho=1.5", "schedule.max_blocks=2")
    run(tmp_path, *rule)
    before = (stage_folder(tmp_path, 2) / "manifest.json").read_bytes()
    config = tiny(*OBJECTIVES["jko"], *SHORT, *rule, "train.iterations=[4,2,9]")
    source = LabelledSource(COUNT)
    train(config, tmp_path, Accelerator(), quiet, True, source, add_blocks=1)
    assert (stage_folder(tmp_path, 2) / "manifest.json").read_bytes() == before
    assert [row.iterations for row in read_manifest(tmp_path).blocks] == [4, 2, 9]


def test_all_samples_of_a_small_set_are_pushed(tmp_path: Path) -> None:
    run(tmp_path)
    assert len(open_store(stage_folder(tmp_path, 2), "stage")) == COUNT


def test_the_bar_of_a_shard_estimates_all_that_are_left(
    least: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1200 samples in shards of 600, pushed in chunks of 200: 6 chunks are left, then 3."""
    monkeypatch.setattr(stages, "CHUNK", 200)
    config = tiny(*OBJECTIVES["jko"], *SHORT, "train.iterations=[1,20,20]")
    bars: dict[str, Bar] = {}

    class Bar(list):
        whole: tuple[str, int, str] = ("", 0, "")

    def progress(items, total: int, label: str) -> Bar:
        return bars.setdefault(label, Bar(items))

    train(config, tmp_path, Accelerator(), progress, resume=False, source=LabelledSource(COUNT))
    pushed = {label: bar.whole for label, bar in bars.items() if "push" in label}
    assert pushed == {
        f"push through block {block}, part {part}": (f"push through block {block}", left, "chunk")
        for block in (0, 1, 2)
        for part, left in ((0, 6), (1, 3))
    }


def test_every_block_pushes_with_its_own_solver(tmp_path: Path) -> None:
    run(tmp_path, "sampler.steps=[1,3,2]")
    stored = [open_store(stage_folder(tmp_path, k), "stage") for k in (1, 2, 3)]
    assert [each.manifest["identity"]["solver"]["steps"] for each in stored] == [1, 3, 2]


@pytest.mark.parametrize("change", ["train.seed=1", "train.batch_size=96"])
def test_lost_stages_of_kept_blocks_are_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    monkeypatch.setattr(stages, "_LEAST", 100)
    steps = ("train.iterations=10", "train.preview_every=0", "train.batch_size=64",
             "jko.h=[0.1,0.3]", "schedule.free_block=true")  # fmt: skip
    arguments = Accelerator(), quiet
    train(tiny(*steps), tmp_path, *arguments, False, GaussianSource())
    train(tiny(*steps, change), tmp_path, *arguments, True, GaussianSource(), add_blocks=1)
    stage = tmp_path / "stages" / "stage-01"
    sums = {path: atomic.sha256_file(path) for path in stage.glob("shard-*")}
    (stage / "shard-00000.safetensors").unlink()
    (stage / "manifest.json").unlink()
    restore_stages(read_config(tmp_path), tmp_path, *arguments, GaussianSource())
    assert {path: atomic.sha256_file(path) for path in sums} == sums
