"""The measured noise of gradients is that of gradients with known moments."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from pipeline.errors import UserError
from pipeline.runs.directory import read_config
from pipeline.training.gradient_noise import gradient_noise, measure_gradient_noise
from pipeline.training.train import train
from tests.pipeline.gaussian_source import GaussianSource, quiet, tiny
from tests.pipeline.tiny import say

SIZE, BATCH, SAMPLES, PROBES = 500, 16, 3.0, 1.5


class KnownGradients:
    """Gradients G + s/√b + p/√b with ‖G‖ = 1, E‖s‖² = SAMPLES², E‖p‖² = PROBES²."""

    def __init__(self, mean: float = 1.0) -> None:
        self.index, self.recipe = 0, SimpleNamespace(batch_size=BATCH)
        self.parameters, self.objective = [torch.zeros(SIZE)], self
        self.mean = torch.full((SIZE,), mean / math.sqrt(SIZE), dtype=torch.float64)

    def gradient(self, step: int, redraw: int = 0) -> Tensor:
        def noise(*place: int) -> Tensor:
            source = torch.Generator().manual_seed(hash(place))
            return torch.randn(SIZE, generator=source, dtype=torch.float64) / math.sqrt(
                SIZE * BATCH
            )

        return self.mean + SAMPLES * noise(step) + PROBES * noise(step, redraw)


def test_known_moments_are_estimated() -> None:
    trainer: Any = KnownGradients()
    row = gradient_noise(trainer, quiet, groups=8, batches=16)
    variance = SAMPLES**2 + PROBES**2
    assert row.variance == pytest.approx(variance, rel=0.02)
    assert row.squared_norm == pytest.approx(1, abs=0.05)
    assert row.critical_batch == pytest.approx(variance, abs=4 * row.error + 0.1)
    assert 0 < row.error < 1
    assert row.drawn == pytest.approx(PROBES**2 / variance, abs=0.01)


def test_no_mean_gradient_has_no_finite_critical_batch() -> None:
    """The estimate of a norm of zero is negative half of the time."""
    trainer: Any = KnownGradients(mean=0.0)
    row = gradient_noise(trainer, quiet)
    assert row.critical_batch > 1000 and row.error == math.inf


def test_a_trained_run_is_measured_and_stays(tmp_path: Path) -> None:
    """The exact divergence draws nothing; the estimator's share is that of its probes."""
    folder, source = tmp_path / "run", GaussianSource()
    train(tiny(), folder, Accelerator(), quiet, resume=False, source=source)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    config, accelerator = read_config(folder), Accelerator()
    rows = list(measure_gradient_noise(config, folder, accelerator, quiet, source))
    assert [row.block for row in rows] == [0, 1, 2]
    assert all(row.drawn == 0 and row.variance > 0 for row in rows)
    estimated = tiny("jko.divergence=hutchinson")
    for row in measure_gradient_noise(estimated, folder, accelerator, quiet, source):
        assert 0 < row.drawn < 1
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_without_blocks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no finished block"):
        list(
            measure_gradient_noise(
                tiny(), tmp_path / "none", Accelerator(), quiet, GaussianSource()
            )
        )


def test_a_distilled_run_is_refused(folder: Path) -> None:
    config = read_config(folder)
    distilled = dataclasses.replace(
        config, train=dataclasses.replace(config.train, objective="distill"), jko=None,
        schedule=None,
    )  # fmt: skip
    with pytest.raises(UserError, match="is distilled; expected one of jko, lfm or fm"):
        list(measure_gradient_noise(distilled, folder, Accelerator(), quiet, GaussianSource()))


def test_the_command_prints_a_row_per_block(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    code, out, _ = say(capsys, "train", "--run", folder, "--measure-noise")
    head, *rows = out.splitlines()
    assert code == 0 and head.split() == "block critical batch (samples) share of probes".split()
    assert [row.split()[0] for row in rows] == [str(k) for k in range(len(rows))] and rows


@pytest.mark.parametrize(
    "option", [("--add-blocks", "2"), ("--init-from", "zoo:mnist"), ("--dry-run",)]
)
def test_options_without_meaning_are_refused(
    capsys: pytest.CaptureFixture[str], folder: Path, option: tuple[str, ...]
) -> None:
    code, _, last = say(capsys, "train", "--run", folder, "--measure-noise", *option)
    assert code == 2 and f"{option[0]} has no meaning for --measure-noise" in last


def test_a_shipped_run_has_no_samples(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, last = say(capsys, "train", "--run", "zoo:mnist", "--measure-noise")
    assert code == 2 and out == "" and "is shipped without the samples" in last


class Later(KnownGradients):
    """The same gradients from another first batch on."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.first = first

    def gradient(self, step: int, redraw: int = 0) -> Tensor:
        return super().gradient(self.first + step, redraw)


def test_the_error_is_the_spread_of_repeated_measurements() -> None:
    trainers: list[Any] = [Later(64 * index) for index in range(40)]
    rows = [gradient_noise(trainer, quiet, groups=8, batches=8) for trainer in trainers]
    spread = torch.tensor([row.critical_batch for row in rows]).std()
    error = torch.tensor([row.error for row in rows]).mean()
    assert float(error / spread) == pytest.approx(1, abs=0.4)
