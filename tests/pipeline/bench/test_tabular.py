"""`jkoflow bench tabular`: rows, a full disk and damaged data."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.bench.bench import Bench
from pipeline.bench.budget import Budget
from pipeline.bench.folder import read_rows
from pipeline.bench.measure import measure
from pipeline.bench.problem import HeldOut, open_problem, problem_config
from pipeline.errors import UserError
from pipeline.tabular.whitening import Whitening
from tests.pipeline.bench.test_bench import CPU, FEW, run
from tests.pipeline.bench.test_results import identity


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


# ---------------------------------------------------------------- whitened rows


def correlated(path, count: int = 4000) -> torch.Tensor:
    """Rows (n, 43) of a normal distribution; return their covariance after standardisation."""
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(count, 43)) @ rng.normal(size=(43, 43)) + rng.normal(size=43)
    np.save(path / "data.npy", rows)
    known = rows[: count - count // 10]
    return torch.from_numpy(np.cov((known - known.mean(0)) / known.std(0), rowvar=False))


def test_whitening_has_unit_covariance_and_an_inverse() -> None:
    rows = torch.randn(3000, 5, generator=torch.Generator().manual_seed(0)).double()
    rows = rows @ torch.tensor(np.random.default_rng(1).normal(size=(5, 5))) + 2
    whitening = Whitening.fit(rows, "rows")
    white = whitening.apply(rows)
    torch.testing.assert_close(torch.cov(white.T.double()), torch.eye(5).double(), atol=1e-5,
                               rtol=0)  # fmt: skip
    torch.testing.assert_close(whitening.undo(white), rows.float(), atol=1e-4, rtol=1e-4)
    expected = float(torch.logdet(torch.cov(rows.T))) / 2
    assert whitening.log_scale == pytest.approx(expected)
    torch.testing.assert_close(whitening.matrix, whitening.matrix.T)
    line = rows[:, :1].repeat(1, 2)
    with pytest.raises(UserError, match="covariance of 3,000 rows of rows has no inverse"):
        Whitening.fit(line, "rows")
    with pytest.raises(UserError, match="covariance of 1 rows of rows has no inverse"):
        Whitening.fit(rows[:1], "rows")


def test_the_identity_on_whitened_rows_is_the_normal_distribution(tmp_path) -> None:
    covariance = correlated(tmp_path)
    config = problem_config("tabular", "miniboone", [f"data.path={tmp_path}"], 0)
    problem = open_problem(config, HeldOut(test=400, compare=400, whitened=True))
    assert "whitened" in problem.note
    measured, samples = measure(identity(43), problem, CPU)
    entropy = 43 * (1 + math.log(2 * math.pi)) / 2 + float(torch.logdet(covariance)) / 2
    assert measured.nll == pytest.approx(entropy, abs=4 * measured.nll_error + 0.5)
    # samples and MMD are in the coordinates of the rows
    assert float((torch.cov(samples.T.double()) - covariance).abs().max()) < 0.4
    assert measured.thresholds is not None and measured.mmd_m < measured.thresholds[0]
    plain = open_problem(config, HeldOut(test=400, compare=400))
    torch.testing.assert_close(problem.compare, plain.compare)
    torch.testing.assert_close(problem.restored(problem.test), plain.test, atol=1e-4, rtol=1e-3)


def test_whitened_rows_are_not_mixed_with_others(tmp_path) -> None:
    correlated(tmp_path, 600)
    settings = (f"data.path={tmp_path}", "train.batch_size=40")
    bench = Bench("tabular", ("otflow",), ("miniboone",), Budget(1, "batches"), 1, 9000, settings,
                  dataclasses.replace(FEW, whitened=True))  # fmt: skip
    (row,) = run(bench, tmp_path / "b")
    assert row.error is None and "whitened" in row.note
    with pytest.raises(UserError, match="whitened of the benchmark at .* is True; this call has"):
        run(dataclasses.replace(bench, held_out=FEW), tmp_path / "b")
    run(dataclasses.replace(bench, held_out=FEW), tmp_path / "plain")
    with pytest.raises(UserError, match="whitened of the benchmark at .* is None"):
        run(bench, tmp_path / "plain")
