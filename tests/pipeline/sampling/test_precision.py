"""Sampling in half precision: stores, metrics, grids and mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.publishing.export import export
from pipeline.publishing.provenance import shows_samples_of
from pipeline.runs.run import open_run
from pipeline.sampling.sampling_plan import differences
from tests.pipeline.drawing import images, plan_of
from tests.pipeline.glance import stand_in
from tests.pipeline.tiny import World, say

HALF = ("--set", "generate.precision=bf16")


def test_half_precision_images_are_close_and_stored_apart(run: Path) -> None:
    opened = open_run(run)
    before = set((run / "samples").glob("images-*"))
    exact, half = images(opened), images(opened, precision="bf16")
    away = (exact.int() - half.int()).abs().float()
    assert 0 < away.max() and away.mean() < 4
    assert (images(opened) == exact).all()
    assert len(set((run / "samples").glob("images-*")) - before) == 2


def test_metrics_and_grids_record_the_precision(
    trained: World, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    stand_in(monkeypatch)
    reference = trained.root / "pictures" / "train"
    words = ("evaluate", "-r", run, "--reference", reference, "-n", "8")
    code, _, said = say(capsys, *words, *HALF)
    assert code == 0 and "seed 0, in bf16)" in said
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["sampling"]["precision"] == "bf16"
    # what was measured so is not shipped with a run that draws otherwise
    with pytest.raises(UserError, match="measured with precision bf16, but the exported run"):
        export(plan_of(open_run(run)), tmp_path / "out")
    assert say(capsys, *words, "--nfe-study", "24", *HALF)[0] == 0
    assert json.loads((run / "nfe.json").read_text())["sampling"]["precision"] == "bf16"
    assert say(capsys, *words)[0] == 0
    assert json.loads((run / "metrics.json").read_text())["sampling"]["precision"] == "fp32"
    grid = run / "samples" / "grid.png"
    assert say(capsys, "generate", "-r", run, *HALF)[0] == 0
    assert not shows_samples_of(grid, plan_of(open_run(run)))
    assert say(capsys, "generate", "-r", run)[0] == 0
    assert shows_samples_of(grid, plan_of(open_run(run)))


def test_plans_of_two_precisions_differ_in_it_alone(run: Path) -> None:
    opened = open_run(run)
    plain, half = (plan_of(opened, precision=name).identity() for name in ("fp32", "bf16"))
    assert differences(plain, half) == {"precision": ("fp32", "bf16")}


def test_an_unknown_precision_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = say(capsys, "generate", "-r", run, "--set", "generate.precision=fp16")
    assert code == 2
    assert "generate.precision is 'fp16'; expected fp32 or bf16" in error
