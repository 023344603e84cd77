"""Previews: they change no weight, and a killed training draws the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from eval.gaussian import GaussianStats
from pipeline.runs.run import open_run
from pipeline.runtime.rng import generator
from pipeline.training import previews
from tests.pipeline.tiny import World, child, run_child, say

#: grids at steps 3 and 6 of all three blocks
OFTEN = {"train": {"preview_every": 3, "checkpoint_seconds": 0.0, "log_every": 1}}
NAMES = [f"block-{block:02d}-step-{step:08d}.png" for block in (0, 1, 2) for step in (3, 6)]


def weights(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "blocks").glob("*")}


def grids(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / "previews").glob("*"))}


def rows(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    clocks = ("time", "seconds")
    return [{k: v for k, v in row.items() if k not in clocks} for row in lines]


@pytest.fixture(scope="module")
def often(trained_world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("often") / "run"
    arguments = ("train", "--config", trained_world.config("often", **OFTEN), "--run", run)
    run_child(*arguments, env=trained_world.environment)
    return run


def test_previews_change_no_weight(often: Path, trained: World, tmp_path: Path) -> None:
    none = tmp_path / "none"
    config = trained.config("none", train={"preview_every": 0})
    run_child("train", "--config", config, "--run", none, env=trained.environment)
    assert not (none / "previews").exists()
    assert list(grids(often)) == NAMES
    assert weights(often) == weights(none)
    flow = [json.loads((run / "flow.json").read_text()) for run in (often, none)]
    hashes = [[row["sha256"] for row in each["passes"][0]["blocks"]] for each in flow]
    assert hashes[0] == hashes[1]


def test_a_killed_training_has_the_same_log_and_previews(
    often: Path, trained: World, tmp_path: Path
) -> None:
    run = tmp_path / "killed"
    config = trained.config("often", **OFTEN)
    arguments = ["train", "--config", config, "--run", run, "--resume"]
    for commit in (7, 14, 9):
        process = child(arguments, trained.environment, commit, after=commit % 2 == 0)
        process.start()
        process.join()
        assert process.exitcode == -9
    run_child(*arguments, env=trained.environment)
    assert grids(run) == grids(often)
    assert rows(run) == rows(often)


def test_the_last_grid_shows_the_finished_flow(often: Path, trained: World) -> None:
    run = open_run(often)
    noise = torch.randn((4, *run.flow.shape), generator=generator("preview", 0))
    z = run.flow.decode(noise, run.config.sampler.of_blocks(3))
    decoded = run.autoencoder().decode(run.standardisation.undo(z))
    expected = ((decoded + 1) * 127.5).round().clamp(0, 255).byte()[:, 0]
    with Image.open(often / "previews" / NAMES[-1]) as picture:
        grid = np.asarray(picture)[::2, ::2]
    for column in range(4):
        left = 2 + column * (expected.shape[-1] + 2)
        cell = grid[2 : 2 + expected.shape[-2], left : left + expected.shape[-1]]
        difference = np.abs(cell.astype(int) - expected[column].numpy().astype(int))
        assert difference.max() <= 1 and cell.std() > 0


@pytest.mark.slow
def test_two_processes_draw_each_preview_once(
    often: Path, trained: World, tmp_path: Path
) -> None:
    """torchrun with gloo; sums of two halves differ from those of one process by rounding."""
    run, config = tmp_path / "two", trained.config("often", **OFTEN)
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = ["-m", "pipeline", "train", "-c", str(config), "-r", str(run)]
    root = Path(__file__).parents[3]
    subprocess.run(
        [sys.executable, "-m", *launch, *words], check=True, cwd=root, timeout=300,
        env={**os.environ, **trained.environment, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert list(grids(run)) == NAMES
    steps = [(row.get("block"), row.get("step")) for row in rows(run)]
    assert steps == [(row.get("block"), row.get("step")) for row in rows(often)]
    for name in NAMES:
        pixels = [np.asarray(Image.open(x / "previews" / name)).astype(int) for x in (run, often)]
        assert np.abs(pixels[0] - pixels[1]).max() <= 2 and pixels[0].std() > 0


#: features of `Means`
WIDTH = 3


class Means(torch.nn.Module):
    """Features that hold the mean grey level."""

    @classmethod
    def from_weights(cls, path: object) -> Means:
        return cls()

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((1, 2, 3))[:, None].expand(-1, WIDTH) / 255


@pytest.mark.parametrize("count", [70, 20])  # at least 64 are drawn
def test_the_fid_of_previews_is_logged(
    trained: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, count: int
) -> None:
    """With features that are all the mean level, FID is WIDTH · ((Δ mean)² + (Δ deviation)²)."""
    real = torch.tensor([60.0, 90.0, 240.0])
    reference = GaussianStats(WIDTH)
    reference.update(Means().features(real[:, None, None, None].expand(-1, 1, 4, 4)))
    monkeypatch.setattr(previews, "FidInception", Means)
    monkeypatch.setattr(previews, "fetch_asset", lambda *_, **__: tmp_path)
    monkeypatch.setattr(previews, "GaussianStats", partial(GaussianStats, WIDTH))
    monkeypatch.setattr(previews, "stats_of", lambda name, network: reference)
    seen, features = [], Means.features
    monkeypatch.setattr(
        Means, "features", lambda self, x: seen.append(len(x)) or features(self, x)
    )
    run, changes = tmp_path / "run", {"train": {"preview_every": 3, "preview_fid": count}}
    assert say(capsys, "train", "--config", trained.config("fid", **changes), "--run", run)[0] == 0
    measured = [row for row in rows(run) if "fid" in row]
    assert [(row["block"], row["step"], row["fid_n"]) for row in measured] == [
        (block, step, count) for block in (0, 1, 2) for step in (3, 6)
    ]
    assert sum(seen) == 6 * count
    opened = open_run(run)
    z = torch.cat(
        [
            opened.flow.decode(
                torch.randn((4, *opened.flow.shape), generator=generator("preview", index)),
                opened.config.sampler.of_blocks(3),
            )
            for index in range(18)
        ]
    )[:count]
    decoded = opened.autoencoder().decode(opened.standardisation.undo(z))
    levels = ((decoded + 1) * 127.5).round().clamp(0, 255).double().mean((1, 2, 3)) / 255
    real = real.double() / 255
    means, deviations = levels.mean() - real.mean(), levels.std() - real.std()
    expected = WIDTH * float(means**2 + deviations**2)
    assert measured[-1]["fid"] == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_an_fid_that_cannot_be_measured_ends_nothing(
    trained: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(previews, "FidInception", Means)
    monkeypatch.setattr(previews, "fetch_asset", lambda *_, **__: tmp_path)
    config = trained.config(
        "absent", train={"preview_fid": 8}, evaluate={"reference": str(tmp_path / "absent")}
    )
    code = say(capsys, "train", "--config", config, "--run", tmp_path / "run")[0]
    assert code == 0 and not [row for row in rows(tmp_path / "run") if "fid" in row]


def test_previews_of_an_absent_tracker_end_the_command(
    trained: World, tmp_path: Path, capsys: Any
) -> None:
    config = trained.config("absent", train={"trackers": ["comet"]})
    code, _, line = say(capsys, "train", "--config", config, "--run", tmp_path / "run")
    assert code == 2 and line.startswith("error: the tracker 'comet' is unknown")
    assert not (tmp_path / "run").exists()
