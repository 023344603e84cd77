"""Trackers: the values and pictures of the log, once each; what is missing or fails."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from PIL import Image

from pipeline.errors import UserError
from pipeline.storage import trackers
from pipeline.storage.trackers import TRACKERS, Trackers
from pipeline.storage.training_log import TrainingLog


@pytest.fixture(autouse=True)
def started(accelerator: Accelerator) -> None:
    """accelerate's trackers ask it which process is the main one."""


def open_log(folder: Path, *names: str, warnings: list[str] | None = None) -> TrainingLog:
    warn = (warnings if warnings is not None else []).append
    return TrainingLog(folder, True, Trackers(names, folder, {"train.lr": 0.1}, warn))


def train(log: TrainingLog, folder: Path, steps: range) -> None:
    """Write what a training of block 2 writes, 100 steps after the start of the run."""
    with log:
        log.rewind(2, steps.start)
        for step in steps:
            log.add({"total": float(step)})
            log.flush(2, step + 1, 101 + step)
        path = folder / "samples.png"
        Image.new("L", (6, 4), 200).save(path)
        log.show(2, steps.stop, 100 + steps.stop, path)


def test_tensorboard_gets_values_and_pictures(tmp_path: Path) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard"
    )
    train(open_log(tmp_path, "tensorboard"), tmp_path, range(3))
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for tag in ("block-02/total", "all/total"):
        points = [(point.step, point.value) for point in events.Scalars(tag)]
        assert points == [(101, 0.0), (102, 1.0), (103, 2.0)]
    (picture,) = events.Images("block-02/samples")
    assert (picture.step, picture.width, picture.height) == (103, 6, 4)


def test_a_resumed_run_sends_nothing_twice(tmp_path: Path) -> None:
    """The first training comes to step 4, is killed, and goes on from a checkpoint of step 2."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard"
    )
    train(open_log(tmp_path, "tensorboard"), tmp_path, range(4))
    train(open_log(tmp_path, "tensorboard"), tmp_path, range(2, 6))
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [point.step for point in events.Scalars("all/total")] == list(range(101, 107))
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 7))


def test_trackio_gets_values_and_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trackio", reason="needs trackio")
    from trackio import sqlite_storage

    monkeypatch.setattr(sqlite_storage, "TRACKIO_DIR", tmp_path / "trackio")
    train(open_log(tmp_path, "trackio"), tmp_path, range(3))
    train(open_log(tmp_path, "trackio"), tmp_path, range(3, 5))
    name = f"{tmp_path.name}-{json.loads((tmp_path / trackers.FILE).read_text())['id']}"
    rows = sqlite_storage.SQLiteStorage.get_logs(trackers.PROJECT, name)
    assert [row["all/total"] for row in rows if "all/total" in row] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert sum("block-02/samples" in row for row in rows) == 2


@pytest.mark.slow
def test_wandb_writes_values_and_pictures_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="needs wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(open_log(tmp_path, "wandb"), tmp_path, range(3))
    known = json.loads((tmp_path / trackers.FILE).read_text())
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert folder.name.endswith(known["id"])
    assert len(list((folder / "files" / "media" / "images").rglob("*.png"))) == 1
    file, deadline = folder / f"run-{known['id']}.wandb", time.monotonic() + 20
    while (size := file.stat().st_size) < 1000 and time.monotonic() < deadline:
        time.sleep(0.1)  # wandb's own process writes it
    written = file.read_bytes()
    assert b"block-02/total" in written and b"all/total" in written, size


@pytest.mark.slow
def test_mlflow_gets_values_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="needs mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    train(open_log(tmp_path, "mlflow"), tmp_path, range(3))
    train(open_log(tmp_path, "mlflow"), tmp_path, range(3, 5))
    run = json.loads((tmp_path / trackers.FILE).read_text())["mlflow"]
    client = mlflow.MlflowClient()
    history = client.get_metric_history(run, "all/total")
    assert sorted((point.step, point.value) for point in history) == [
        (101 + step, float(step)) for step in range(5)
    ]
    assert client.list_artifacts(run, "block-02/samples")


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_that_is_not_installed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda module: None)
    with pytest.raises(UserError, match=rf"{name} is not installed.*jkoflow\[{name}\]"):
        Trackers([name], tmp_path, {}, print)


def test_an_unknown_tracker(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'comet' is unknown; expected one of tensorboard"):
        Trackers(["comet"], tmp_path, {}, print)


def test_a_tracker_that_fails_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("tensorboard") is None:
        pytest.skip("needs tensorboard")
    warnings: list[str] = []
    log = open_log(tmp_path, "tensorboard", warnings=warnings)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    assert log._trackers is not None
    monkeypatch.setattr(log._trackers._trackers[0].writer, "add_scalar", fail)
    train(log, tmp_path, range(3))
    assert len(warnings) == 1 and "tensorboard failed and is dropped: disk full" in warnings[0]
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3


def test_a_full_disk_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """At the start it is an error; later the tracker is dropped, and the training goes on."""
    writer = pytest.importorskip("tensorboard.summary.writer.record_writer").RecordWriter
    said: list[str] = []
    later = Trackers(["tensorboard"], tmp_path / "b", {}, said.append)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "write", full)
    with pytest.raises(UserError, match="tensorboard does not start .*No space left on device"):
        Trackers(["tensorboard"], tmp_path / "a", {}, said.append)
    for step in range(50):
        later.log({"x": 1.0}, step)
        time.sleep(0.01)
    assert len(said) == 1 and "is dropped: [Errno 28] No space left on device" in said[0]
    assert "Traceback" not in capfd.readouterr().err
