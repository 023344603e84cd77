"""The search of learning rates: its choice, its record, and its failures."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from pipeline.bench import tuning as tuning_module
from pipeline.bench.bench import Bench
from pipeline.bench.budget import Budget, used_seconds
from pipeline.bench.folder import read_rows
from pipeline.bench.problem import open_problem, problem_config
from pipeline.cli.main import app
from pipeline.errors import JkoflowError, UserError
from tests.pipeline.bench.test_bench import FEW, TINY, run, tiny

RATES = (1e-9, 0.05)


def test_the_rate_of_the_least_nll_is_taken_and_the_search_is_not_repeated(tmp_path) -> None:
    bench = tiny("otflow", budget=Budget(20, "batches"), rates=RATES)
    rows = run(bench, tmp_path / "b")
    search = json.loads((tmp_path / "b" / "tuning" / "otflow.json").read_text())
    assert search["rates"] == list(RATES) and search["budget"] == "5 batches"
    assert search["nll"][1] < search["nll"][0] and search["chosen"] == 0.05 == rows[0].lr
    table = (tmp_path / "b" / "table.md").read_text()
    assert "OT-Flow: learning rate 0.05; tried with 5 batches on 8gaussians" in table
    assert run(bench, tmp_path / "b") == rows
    # the same training without a search
    alone = run(tiny("otflow", budget=Budget(20, "batches"), overrides=(*TINY, "train.lr=0.05")),
                tmp_path / "alone")  # fmt: skip
    assert alone[0].measured == rows[0].measured
    with pytest.raises(UserError, match="rates of the benchmark"):
        run(tiny("otflow", budget=Budget(20, "batches")), tmp_path / "b")


def test_failures_of_the_search(tmp_path, monkeypatch) -> None:
    real = tuning_module.measure

    def fail(model, problem, *rest, **words):
        if problem.learning_rate in failing:
            raise JkoflowError("no luck")
        return real(model, problem, *rest, **words)

    monkeypatch.setattr(tuning_module, "measure", fail)
    failing = {RATES[1]}
    rows = run(tiny("otflow", rates=RATES), tmp_path / "one")
    assert rows[0].lr == RATES[0]
    assert "0.05 (failed)" in (tmp_path / "one" / "table.md").read_text()
    failing = set(RATES)
    rows = run(tiny("otflow", rates=RATES), tmp_path / "all")
    assert rows[0].error is not None and "each learning rate of 1e-09, 0.05" in rows[0].error


def test_an_interrupted_search_is_not_continued_on_other_data(tmp_path, monkeypatch) -> None:
    def stop(*_args, **_words):
        raise KeyboardInterrupt

    settings = {"budget": Budget(8, "batches"), "rates": (0.05, 0.01)}
    with monkeypatch.context() as patch:
        patch.setattr(tuning_module, "measure", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tiny("otflow", data=("rose",), **settings), tmp_path / "b")
    bench = tiny("otflow", data=("tree",), **settings)
    rows = run(bench, tmp_path / "b")
    assert [row.measured for row in rows] == [row.measured for row in run(bench, tmp_path / "c")]
    searches = [tmp_path / name / "tuning" / "otflow.json" for name in ("b", "c")]
    assert searches[0].read_bytes() == searches[1].read_bytes()


def test_the_search_has_samples_of_its_own(tmp_path) -> None:
    bench = tiny("otflow")
    points = open_problem(problem_config("toy2d", "8gaussians", TINY, 0), FEW)
    assert not torch.equal(bench.open_search().test, points.test)
    rows = torch.randn(600, 43, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "data.npy", rows.double().numpy())
    config = problem_config("tabular", "miniboone", [f"data.path={tmp_path}"], 0)
    test, validation = (open_problem(config, FEW, split) for split in ("test", "validation"))
    assert test.test.shape == (60, 43) and len(validation.test) == 54
    assert not torch.equal(test.test[:54], validation.test)


def test_seconds_of_a_processor_do_not_count_waiting() -> None:
    began = used_seconds(torch.device("cpu"))
    time.sleep(0.2)
    assert used_seconds(torch.device("cpu")) - began < 0.1


@pytest.mark.parametrize(("rates", "words"), [
    ("1e-3,fast", "--tune is"), ("0,1", "positive"), ("1e-3,0.001", "each of them once"),
])  # fmt: skip
def test_bad_rates_are_one_sentence(rates: str, words: str, tmp_path) -> None:
    call = ["bench", "toy2d", "--budget", "2b", "--tune", rates, "--run", str(tmp_path / "b")]
    failed = CliRunner().invoke(app, call)
    assert isinstance(failed.exception, UserError) and words in str(failed.exception)
    assert read_rows(tmp_path / "b") == []


def test_the_search_on_a_table_is_on_its_validation_split(tmp_path) -> None:
    np.save(tmp_path / "data.npy", np.random.default_rng(0).normal(size=(600, 43)))
    settings = (f"data.path={tmp_path}",)
    bench = Bench("tabular", ("otflow",), ("miniboone",), Budget(2, "batches"), 1, 9000, settings,
                  FEW)  # fmt: skip
    config = problem_config("tabular", "miniboone", settings, 0)
    assert torch.equal(bench.open_search().test, open_problem(config, FEW, "validation").test)
