"""`jkoflow bench tabular`: rows, a full disk and damaged data."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.bench.bench import Bench, read_rows
from pipeline.bench.budget import Budget
from pipeline.errors import UserError
from tests.pipeline.bench.test_bench import FEW, run


def test_a_table_is_trained_and_measured(tmp_path) -> None:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "data.npy", rng.normal(size=(600, 43)))
    settings = (f"data.path={tmp_path}", "train.batch_size=40", "jko.h=[0.5]", "data.limit=200")
    bench = Bench("tabular", ("jko", "otflow"), ("miniboone",), Budget(2, "batches"), 1, 9000,
                  settings)  # fmt: skip
    rows = run(bench, tmp_path / "b")
    for result in rows:
        assert result.error is None and result.measured is not None
        # 43 independent standard normals; jko starts as the identity, OT-Flow does not
        near = 4 if result.model == "jko" else 20
        assert result.measured.nll == pytest.approx(43 * 1.4189, abs=near)
        assert "for tests alone" in result.note
    assert not list((tmp_path / "b").rglob("stage-*"))
    assert not (tmp_path / "b" / "plots" / "miniboone-samples.png").exists()


def test_a_disk_without_room_for_the_rows_is_named(tmp_path, monkeypatch) -> None:
    np.save(tmp_path / "data.npy", np.random.default_rng(0).normal(size=(600, 43)))
    full = SimpleNamespace(free=1000)
    monkeypatch.setattr("pipeline.runtime.system.shutil.disk_usage", lambda _: full)
    settings = (f"data.path={tmp_path}", "train.batch_size=40")
    bench = Bench("tabular", ("otflow",), ("miniboone",), Budget(2, "batches"), 1, 9000, settings)
    with pytest.raises(UserError, match="the training rows need about"):
        run(bench, tmp_path / "b")


def test_damaged_data_end_a_call_and_leave_its_rows(tmp_path) -> None:
    rows = np.random.default_rng(0).normal(size=(600, 43))
    np.save(tmp_path / "data.npy", rows)
    settings = (f"data.path={tmp_path}", "train.batch_size=40", "jko.h=[0.5]")
    bench = Bench("tabular", ("otflow",), ("miniboone",), Budget(1, "batches"), 1, 9000, settings,
                  FEW)  # fmt: skip
    done = run(bench, tmp_path / "b")
    np.save(tmp_path / "data.npy", np.where(rows > 3, np.nan, rows))
    with pytest.raises(UserError, match="rows with NaN or infinity"):
        run(dataclasses.replace(bench, models=("otflow", "ignn")), tmp_path / "b")
    assert read_rows(tmp_path / "b") == done and done[0].error is None
