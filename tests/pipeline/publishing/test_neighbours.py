"""Nearest training images: those of a search over all, and copies are seen."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from pipeline.data.datasets import load_images
from pipeline.publishing.neighbours import MEASURED, SHOWN, draw_neighbours, nearest, ratios
from pipeline.runs.run import open_run
from tests.pipeline.drawing import plan_of
from tests.pipeline.gaussian_source import quiet
from tests.pipeline.tiny import World, pictures, say


def test_copies_are_found() -> None:
    points = torch.randn(70, 5, generator=torch.Generator().manual_seed(0))
    copies = points[[3, 69, 31]] + 1e-4
    distances, indices = nearest(copies, points.split(30))
    assert indices.tolist() == [3, 69, 31]
    assert torch.allclose(distances[:, 0], torch.full((3,), 1e-4 * 5**0.5), rtol=1e-2)
    all_distances = torch.cdist(copies, points).sort(1).values
    assert torch.allclose(distances[:, 1], all_distances[:, 1], rtol=1e-5)
    assert torch.isinf(nearest(copies, [points[:1]])[0][:, 1]).all()


def test_two_distances_of_zero_are_no_sign_of_a_copy() -> None:
    """Ratios are d₁ / d₂; a point that lies twice in the training set is a duplicate of it."""
    distances = torch.tensor([[0.0, 0.0], [1.0, 4.0], [0.0, 2.0], [1.0, torch.inf]])
    assert ratios(distances).tolist() == [1, 0.25, 0, 1]


class Levels:
    """Features that hold the mean grey level, 2048 times."""

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((1, 2, 3))[:, None].expand(-1, 2048)


def generated(
    folder: Path, n: int, capsys: pytest.CaptureFixture[str]
) -> list[np.ndarray[Any, Any]]:
    """The first n images of the run, as `jkoflow generate` saves them: grey levels (12, 12)."""
    out = folder.parent / "images"
    assert say(capsys, "generate", "--run", folder, "-n", n, "--images", out)[0] == 0
    return [np.asarray(Image.open(path)) for path in sorted(out.rglob("*.png"))]


def test_a_report_shows_the_nearest_training_images(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("evaluation.features", "publishing.neighbours"):
        monkeypatch.setattr(f"pipeline.{module}.load_inception", lambda _: Levels())
    code, out, _ = say(capsys, "report", "--run", folder, "--neighbours", 40)
    assert code == 0 and "neighbours.png" in Path(out.strip()).read_text()
    with Image.open(folder / "samples" / "neighbours.png") as picture:
        grid = np.asarray(picture)[::2, ::2]
    cells = [
        [grid[2 + 14 * row : 14 + 14 * row, 2 + 14 * k : 14 + 14 * k] for k in range(SHOWN)]
        for row in range(3)
    ]
    all_samples = np.stack(generated(folder, MEASURED, capsys)).astype(float)
    train = pictures(40, 1).astype(float)
    result = json.loads((folder / "neighbours.json").read_text())

    # the ten samples with the smallest ratios, by a search over all pairs
    distances = np.sqrt(((all_samples[:, None] - train[None]) ** 2).sum((2, 3))) / 255
    two = np.sort(distances, 1)[:, :2]
    ratios = two[:, 0] / two[:, 1]
    shown = np.array(result["samples"])
    assert np.allclose(np.sort(ratios)[:SHOWN], ratios[shown], rtol=1e-5)
    assert result["pixels"]["smallest_ratio"] == pytest.approx(ratios.min(), rel=1e-4)
    expected = np.sort(two[:, 0])[(MEASURED - 1) // 2]  # torch's median is the lower one
    assert result["pixels"]["median_distance"] == pytest.approx(expected, rel=1e-4)
    assert result["pixels"]["median_distance_of_test_images"] > 0
    assert 0 < result["pixels"]["smallest_ratio_of_test_images"] <= 1

    # the picture: samples, and their neighbours by pixels and by features
    samples = all_samples[shown]
    by_pixels = distances[shown].argmin(1)
    levels = np.abs(samples.mean((1, 2))[:, None] - train.mean((1, 2))[None]).argmin(1)
    assert result["pixels"]["indices"] == by_pixels.tolist()
    assert result["features"]["indices"] == levels.tolist()
    assert np.array_equal(np.array(cells[0]), samples)
    assert np.array_equal(np.array(cells[1]), train[by_pixels])
    assert np.array_equal(np.array(cells[2]), train[levels])


def test_without_a_test_split_there_is_no_distance_of_test_images(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training images compared with themselves would have the distance 0."""
    for module in ("evaluation.features", "publishing.neighbours"):
        monkeypatch.setattr(f"pipeline.{module}.load_inception", lambda _: Levels())
    monkeypatch.setattr("pipeline.publishing.neighbours.held_out_images", load_images)
    assert say(capsys, "report", "--run", folder, "--neighbours", 40)[0] == 0
    result = json.loads((folder / "neighbours.json").read_text())
    assert result["pixels"]["median_distance_of_test_images"] is None
    assert result["pixels"]["smallest_ratio_of_test_images"] is None
    assert result["features"]["median_distance"] >= 0


def test_more_data_make_no_test_split(
    trained: World, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training images of a folder without splits are no test images, also with data.also."""
    for module in ("evaluation.features", "publishing.neighbours"):
        monkeypatch.setattr(f"pipeline.{module}.load_inception", lambda _: Levels())
    plan = plan_of(open_run(folder))
    data = dataclasses.replace(
        plan.run.config.data, path=str(trained.root / "pictures" / "train"), also=["folder"]
    )
    config = dataclasses.replace(plan.run.config, data=data)
    plan = dataclasses.replace(plan, run=dataclasses.replace(plan.run, config=config))
    draw_neighbours(plan, 80, Accelerator(), quiet)
    result = json.loads((folder / "neighbours.json").read_text())
    assert result["pixels"]["median_distance_of_test_images"] is None


def test_neighbours_of_a_comparison(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, line = say(capsys, "report", "a", "b", "--neighbours", 5)
    assert code == 2 and "--neighbours goes with --run" in line


def test_more_neighbours_than_images(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, line = say(capsys, "report", "--run", folder, "--neighbours", 41)
    assert code == 2 and "41 images were asked for" in line
