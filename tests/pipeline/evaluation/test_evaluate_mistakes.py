"""Settings that an evaluation refuses, and references of other images."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from eval.references import load_reference
from pipeline.config.data import DataConfig
from pipeline.evaluation import evaluator
from pipeline.evaluation.evaluator import (
    _metrics_file,
    _real_test_fid,
    _training_cost,
    warn_of_other_data,
)
from pipeline.runs.run import open_run
from tests.pipeline.glance import stand_in
from tests.pipeline.tiny import World, say


@pytest.fixture(autouse=True)
def small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-n", "1"], "at least 2 images, not 1"),
        (["-n", "41"], "41 images were asked for, but folder (train) has 40"),
        (["-n", "4", "--steps", "2", "--nfe", "12"], "--steps and --nfe both choose"),
        (["-n", "20", "--kid", "3"], "at least 4 images of either kind, not --kid 3 and -n 20"),
        (["-n", "3", "--kid", "20"], "not --kid 20 and -n 3"),
        (["-n", "4", "--kid", "50"], "50 images were asked for, but folder (train) has 40"),
        (
            ["-n", "4", "--set", "evaluate.nll=25"],
            "folder (test) has 24; use --set evaluate.nll=24",
        ),
        (["-n", "4", "--set", "evaluate.nll=-1"], "evaluate.nll is -1; expected at least 0"),
        (["-n", "4", "--reference", "nowhere"], "nowhere"),
        (["-n", "4", "--set", "train.lr=1"], "no effect here"),
        (["-n", "4", "--nfe-study", "12", "--steps", "2"], "leave --steps and --nfe out"),
        (["-n", "4", "--nfe-study", "12,x"], "--nfe-study takes a whole number"),
        (["-n", "4", "--nfe-study", "11"], "--nfe 11 is below one rk4 step"),
        (["-n", "1", "--nfe-study", "12"], "at least 2 images, not 1"),
        (["-n", "4", "--nfe-study", "12", "--dry-run"], "evaluation without --nfe-study"),
        (["-n", "4", "--curve", "--dry-run"], "an evaluation without --curve; leave one out"),
        (["-n", "4", "--blocks", "9"], "--blocks must lie between 1 and 3"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    capsys: pytest.CaptureFixture[str], trained: World, folder: Path, words: list[str], said: str
) -> None:
    reference = ["--reference", str(trained.root / "pictures" / "train")]
    code, _, last = say(capsys, "evaluate", "--run", folder, *reference, *words)
    assert code == 2 and last.startswith("error: ") and said in last, last
    assert not (folder / "metrics.json").exists()


def test_the_printed_file_has_the_metrics(
    capsys: pytest.CaptureFixture[str], trained: World, folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    stand_in(monkeypatch)
    reference = ("--reference", trained.root / "pictures" / "train", "--set", "evaluate.nll=0")
    for n, name in ((20, "metrics.json"), (10, "metrics-10.json")):
        code, out, _ = say(capsys, "evaluate", "--run", folder, *reference, "-n", n)
        assert code == 0 and out.strip() == str(folder / name)
        assert json.loads(Path(out.strip()).read_text())["fid"]["n"] == n


def test_a_reference_of_other_images_gives_a_warning(folder: Path) -> None:
    """The metrics have no FID of real test images then."""
    run = open_run(folder)
    assert load_reference("mnist-train").card["test_split_fid"]["2000"] > 0
    settings = dataclasses.replace(run.config.evaluate, n=2000, reference="mnist-train")
    assert _real_test_fid(run, settings) is None
    digits = dataclasses.replace(run.config, data=DataConfig("mnist"))
    data = dataclasses.replace(run.manifest.data, name="mnist")
    manifest = dataclasses.replace(run.manifest, data=data)
    digits_run = dataclasses.replace(run, config=digits, manifest=manifest)
    assert _real_test_fid(digits_run, settings) == pytest.approx(3.657, abs=1e-3)
    assert warn_of_other_data(digits_run, "mnist-train") is None
    assert warn_of_other_data(run, "a folder") is None
    joined = dataclasses.replace(manifest, data=dataclasses.replace(data, name="folder+mnist"))
    assert "images are folder+mnist" in str(
        warn_of_other_data(dataclasses.replace(run, manifest=joined), "mnist-train")
    )
    warning = warn_of_other_data(run, "mnist-train")
    assert warning is not None and "is of mnist, but the run's images are folder" in warning


def test_metrics_of_more_images_are_kept(tmp_path: Path) -> None:
    run: Any = SimpleNamespace(folder=tmp_path)

    def metrics(n: int, sampling: str = "same") -> dict[str, Any]:
        return {"fid": {"n": n, "reference": "digits"}, "sampling": sampling}

    assert _metrics_file(run, metrics(8)).name == "metrics.json"
    (tmp_path / "metrics.json").write_text(json.dumps(metrics(10_000)))
    assert _metrics_file(run, metrics(8)).name == "metrics-8.json"
    for other in (metrics(10_000), metrics(20_000), metrics(8, "of other blocks")):
        assert _metrics_file(run, other).name == "metrics.json"


def test_the_fid_of_real_images_is_that_of_the_same_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run(folder)
    card = {"dataset": "folder", "test_split_fid": {"20": 3.5, "30": 2.5}}
    card["content_sha256"] = run.manifest.data.fingerprint
    monkeypatch.setattr(evaluator, "_card", lambda reference: card)
    at = [dataclasses.replace(run.config.evaluate, n=n) for n in (20, 21)]
    assert [_real_test_fid(run, settings) for settings in at] == [3.5, None]
    card["content_sha256"] = "of another folder"
    assert _real_test_fid(run, at[0]) is None


def test_the_cost_is_that_of_the_blocks_in_use(folder: Path) -> None:
    run = open_run(folder, blocks=2)
    cost, rows = _training_cost(run), run.manifest.blocks[:2]
    assert [row["h"] for row in cost["blocks"]] == [row.h for row in rows]
    assert cost["train_seconds"] == pytest.approx(sum(row.seconds for row in rows))


def test_metrics_against_another_reference_are_not_kept_apart(tmp_path: Path) -> None:
    run: Any = SimpleNamespace(folder=tmp_path)
    kept = {"fid": {"n": 100, "reference": "digits"}, "sampling": "same"}
    (tmp_path / "metrics.json").write_text(json.dumps(kept))
    other = {"fid": {"n": 8, "reference": "letters"}, "sampling": "same"}
    assert _metrics_file(run, other).name == "metrics.json"
