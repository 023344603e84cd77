"""`jkoflow bench`: rows, resuming, failures, budgets, and mistakes."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import shutil
import signal
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from typer.testing import CliRunner

from flows.baselines.registry import config_from_dict, make_baseline
from pipeline.bench import bench as bench_module
from pipeline.bench import training as training_module
from pipeline.bench.bench import Bench, run_bench
from pipeline.bench.budget import Budget
from pipeline.bench.folder import read_rows
from pipeline.bench.measure import measure
from pipeline.bench.models import (
    AUTOREGRESSIVE,
    BLOCKWISE,
    TITLES,
    blockwise_config,
)
from pipeline.bench.problem import HeldOut, open_problem, problem_config
from pipeline.bench.results import Row
from pipeline.bench.training import Training
from pipeline.cli.main import app
from pipeline.errors import JkoflowError, UserError
from pipeline.runs import verify
from pipeline.runs.run import open_run
from pipeline.runtime import signals
from pipeline.runtime.console import no_progress
from pipeline.storage import atomic
from pipeline.storage.records import to_json
from pipeline.training.train import train

TINY = (
    "points.train=300", "train.batch_size=50", "jko.h=[0.5]", "velocity.depth=1",
)  # fmt: skip
HAS_ZUKO = find_spec("zuko") is not None
#: models whose packages are installed
MODELS = [name for name in TITLES if HAS_ZUKO or name not in AUTOREGRESSIVE]
FEW = HeldOut(test=60, compare=40)
CPU = torch.device("cpu")


def tiny(*models: str, **changes) -> Bench:
    values = {"data": ("8gaussians",), "budget": Budget(2, "batches"), "seeds": 1,
              "parameters": 600, "overrides": TINY, "held_out": FEW}  # fmt: skip
    return Bench("toy2d", models, **{**values, **changes})


def run(bench: Bench, folder, plots: bool = False) -> list[Row]:
    with pytest.MonkeyPatch.context() as patch:
        if not plots:
            patch.setattr(bench_module, "draw_plots", lambda *_: None)
        return run_bench(bench, folder, Accelerator(cpu=True), lambda items, *_: items)


def files(folder) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "toy"
    return folder, run(tiny(*MODELS), folder, plots=True)


def test_every_model_has_a_row_with_its_budget(finished) -> None:
    folder, rows = finished
    assert [row.model for row in rows] == MODELS
    for row in rows:
        assert row.error is None and row.measured is not None
        assert row.batches == 2 and 0 < row.parameters <= 600 and row.seconds > 0
        assert math.isfinite(row.measured.nll) and row.measured.nll_error > 0
        assert row.measured.n == 60 and row.measured.compare == 40
    lines = (folder / "table.md").read_text().splitlines()
    assert sum(line.startswith("| ") for line in lines) == len(MODELS) + 1
    with (folder / "table.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [float(line["nll"]) for line in read] == [row.measured.nll for row in rows]
    kept = atomic.read_tensors(folder / "8gaussians" / "jko" / "seed-0" / "samples.safetensors")
    assert kept["log_density"].shape == (40, 40) and kept["log_density"].isfinite().all()
    for name in ("8gaussians-nll", "8gaussians-mmd", "8gaussians-samples"):
        with Image.open(folder / "plots" / f"{name}.png") as picture:
            assert min(picture.size) > 100


def test_the_work_of_a_call_is_said_before_it(
    tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two models with two seeds, 4 · 60 s, and three rates for each model, 6 · 15 s."""

    def cell(tuner, model: str, problem, place) -> Row:
        row = Row(problem.name, model, problem.config.train.seed, problem.note, error="none")
        atomic.write_json(place / "row.json", to_json(row))
        return row

    monkeypatch.setattr(bench_module, "run_cell", cell)
    bench = tiny("jko", "fm", seeds=2, budget=Budget(60, "seconds"), rates=(1e-3, 1e-2, 1e-1))
    run(bench, tmp_path / "bench")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == (
        "4 trainings of 60 seconds, and 6 of 15 seconds that choose learning rates: "
        "5.5 minutes of optimiser steps, without measurements"
    )
    left = [line.partition(";")[0] for line in lines if line.endswith(" are left")]
    assert left == [f"{done} of 4 trainings" for done in (1, 2, 3)]


def test_a_saved_baseline_is_the_measured_model(finished) -> None:
    folder, rows = finished
    problem = open_problem(problem_config("toy2d", "8gaussians", TINY, 0), FEW)
    for row in rows[len(BLOCKWISE):]:
        cell = folder / "8gaussians" / row.model / "seed-0"
        described = json.loads((cell / "model.json").read_text())
        config = config_from_dict(described["model"], described["config"])
        model = make_baseline(described["model"], config, described["dim"])
        model.load_state_dict(atomic.read_tensors(cell / "model.safetensors"))
        again, samples = measure(model, problem, CPU)
        assert again.nll == pytest.approx(row.measured.nll, rel=1e-5)
        assert again.mmd_m == pytest.approx(row.measured.mmd_m, rel=1e-3)
        torch.testing.assert_close(
            samples,
            atomic.read_tensors(cell / "samples.safetensors")["samples"],
            rtol=1e-3,
            atol=1e-3,
        )


def test_rows_are_added_and_none_is_repeated(finished, tmp_path) -> None:
    first = run(tiny("otflow"), tmp_path / "b")
    kept = files(tmp_path / "b" / "8gaussians")
    more = run(tiny("otflow", "ignn", data=("8gaussians", "gaussian")), tmp_path / "b")
    assert len(more) == 4 and first[0] in more
    assert kept.items() <= files(tmp_path / "b" / "8gaussians").items()
    assert first[0].measured == finished[1][list(TITLES).index("otflow")].measured
    several = run(tiny("otflow", seeds=2), tmp_path / "b")
    assert {row.seed for row in several if row.model == "otflow"} == {0, 1}
    table = (tmp_path / "b" / "table.md").read_text()
    assert table.count("±") >= 4 and "## gaussian" in table


def test_a_failed_training_is_a_row_and_is_tried_again(tmp_path, monkeypatch) -> None:
    def broken(*_args, **_kwargs):
        raise JkoflowError("block 0 failed at step 2: the loss is nan; lower train.lr")

    with monkeypatch.context() as patch:
        patch.setattr(bench_module.Training, "train", broken)
        rows = run(tiny("otflow", "jko"), tmp_path / "b")
    assert [row.error is None for row in rows] == [False, False]
    assert "failed: block 0 failed at step 2" in (tmp_path / "b" / "table.md").read_text()
    rows = run(tiny("otflow"), tmp_path / "b")
    assert {row.model: row.error is None for row in rows} == {"jko": False, "otflow": True}


def test_an_interrupted_training_by_blocks_goes_on(finished, tmp_path, monkeypatch) -> None:
    def stop(*_args, **_kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bench_module, "measure", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tiny("jko"), tmp_path / "b")
    rows = run(tiny("jko"), tmp_path / "b")
    assert rows[0].measured == finished[1][0].measured


def test_seconds_of_a_checkpoint_are_not_taken_from_the_overhead(tmp_path) -> None:
    """The rest of a call is its seconds without those of its own optimiser steps."""
    problem = open_problem(problem_config("toy2d", "8gaussians", TINY, 0), FEW)
    config, clock = blockwise_config(problem.config, "jko", 8, 4), itertools.count()
    accelerator, folder = Accelerator(cpu=True), tmp_path / "training"
    train(
        config, folder, accelerator, no_progress, True, problem.source, until=1,
        clock=lambda: 1000.0 * next(clock),
    )  # fmt: skip
    training = Training(Budget(4, "batches"), 600, accelerator, no_progress)
    trained = training.train("jko", problem, folder, lambda _: None)
    assert trained.seconds >= 1000 and trained.overhead > 0


def stopped(bench: Bench, folder, monkeypatch, after: int) -> None:
    """Run a benchmark that gets SIGTERM in a step of a baseline."""
    step, steps = bench_module.Training._step, []

    def signalled(*arguments):
        step(*arguments)
        steps.append(arguments)
        if len(steps) == after:
            os.kill(os.getpid(), signal.SIGTERM)

    restore = signals.install()
    with monkeypatch.context() as patch:
        patch.setattr(bench_module.Training, "_step", staticmethod(signalled))
        patch.setattr(signals, "GRACE_SECONDS", 600.0)  # of the clock, on a busy machine
        try:
            with pytest.raises(signals.Interrupted):
                run(bench, folder)
        finally:
            restore()
            signals.install()()  # forgets the signal, as the end of a process does
    assert len(steps) == after  # it ends at once


@pytest.mark.parametrize("model", [m for m in MODELS if m not in BLOCKWISE])
def test_a_baseline_goes_on_after_a_signal(model, finished, tmp_path, monkeypatch) -> None:
    """The model, its curve and its metrics are those of an uninterrupted training."""
    stopped(tiny(model), tmp_path / "b", monkeypatch, after=1)
    place = Path("8gaussians", model, "seed-0")
    assert (tmp_path / "b" / place / "training" / "checkpoint.safetensors").is_file()
    (row,) = run(tiny(model), tmp_path / "b")
    whole = next(row for row in finished[1] if row.model == model)
    assert row.measured == whole.measured
    assert [(p.batches, p.nll) for p in row.curve] == [(p.batches, p.nll) for p in whole.curve]
    for name in ("model.safetensors", "samples.safetensors"):
        again = atomic.read_tensors(tmp_path / "b" / place / name)
        for key, value in atomic.read_tensors(finished[0] / place / name).items():
            assert torch.equal(again[key], value), (name, key)
    assert not (tmp_path / "b" / place / "training" / "checkpoint.safetensors").exists()


def test_a_search_of_learning_rates_goes_on_after_a_signal(tmp_path, monkeypatch) -> None:
    bench = tiny("otflow", budget=Budget(8, "batches"), rates=(1e-3, 1e-2))
    run(bench, tmp_path / "whole")
    stopped(bench, tmp_path / "b", monkeypatch, after=3)  # the first step of the second rate
    steps, step = [], bench_module.Training._step
    with monkeypatch.context() as patch:
        patch.setattr(bench_module.Training, "_step",
                      staticmethod(lambda *a: (steps.append(a), step(*a))))  # fmt: skip
        run(bench, tmp_path / "b")
    assert len(steps) == 1 + 8  # what was left of the search, and the training itself
    file = Path("tuning", "otflow.json")
    assert (tmp_path / "b" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert [p.name for p in (tmp_path / "b" / "tuning").iterdir()] == ["otflow.json"]


def test_a_budget_of_seconds_is_kept(tmp_path) -> None:
    rows = run(tiny("otflow", "fm", budget=Budget(0.4, "seconds")), tmp_path / "b")
    assert all(row.batches >= 1 and row.seconds > 0 for row in rows)
    otflow = next(row for row in rows if row.model == "otflow")
    assert [point.seconds for point in otflow.curve] == sorted(p.seconds for p in otflow.curve)
    assert len(otflow.curve) <= 3 and otflow.seconds >= 0.4
    assert all(point.seconds < 0.4 for point in otflow.curve)


# ---------------------------------------------------------------- problems


def test_passes_with_other_steps_share_the_budget(tmp_path) -> None:
    settings = (*TINY, "jko.reparameterize=1")
    (row,) = run(tiny("jko", overrides=settings, budget=Budget(9, "batches")), tmp_path / "b")
    assert row.error is None and row.batches == 8 and row.seconds > 0
    manifest = open_run(tmp_path / "b" / "8gaussians" / "jko" / "seed-0" / "training").manifest
    assert [entry.iterations for entry in manifest.passes] == [[3, 1], [3, 1]]
    assert row.parameters == sum(block.parameters for block in manifest.blocks) <= 600
    # the first point of the curve is of one block of the last pass: 4 batches before it, and 3
    assert [point.batches for point in row.curve] == [7]


def test_a_picture_is_a_problem(tmp_path) -> None:
    levels = np.full((4, 8), 255, np.uint8)
    levels[0, 0] = 0  # the upper left corner
    Image.fromarray(levels).save(tmp_path / "dot.png")
    config = problem_config("toy2d", "picture", [f"data.path={tmp_path / 'dot.png'}"], 3)
    problem = open_problem(config, FEW)
    assert config.name == "picture" and config.train.seed == 3
    assert (problem.test[:, 0] <= -3).all() and (problem.test[:, 1] >= 2).all()


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("text", "words"),
    [("0s", "more than 0"), ("0 batches", "more than 0"), ("2.5b", "whole number"),
     ("60", "with its unit"), ("-3s", "with its unit"), ("1h", "with its unit")],
)  # fmt: skip
def test_bad_budgets_are_one_sentence(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Budget.parse(text)


def test_budgets_have_two_units() -> None:
    assert Budget.parse("1.5 seconds") == Budget(1.5, "seconds")
    assert str(Budget.parse("2000b")) == "2000 batches"
    for text in ("1234567 batches", "1000000 batches", "1.5 seconds", "60 seconds"):
        assert str(Budget.parse(text)) == text  # bench.json keeps it, and a repair reads it
    assert Budget(10, "batches").spent(5, 99.0) == 0.5
    assert Budget(10, "seconds").spent(5, 2.5) == 0.25


def test_mistakes_are_one_sentence_and_leave_rows(finished, tmp_path) -> None:
    folder, rows = finished
    cases = [
        (tiny("jko", "glow"), "model 'glow' is unknown"),
        (tiny(), "at least one name"),
        (tiny("jko", "jko"), "each of them once"),
        (tiny("jko", data=("moons",)), "data set 'moons' is not in toy2d"),
        (tiny("jko", seeds=0), "--seeds is 0"),
        (tiny("jko", budget=Budget(9, "batches")), "budget of the benchmark"),
        (tiny("jko", overrides=(*TINY, "train.lr=0.1")), "overrides of the benchmark"),
        (tiny("jko", overrides=(*TINY, "train.objective=fm")), "expected jko|applies to"),
        (tiny("jko", overrides=(*TINY, "train.seed=7")), "train.seed is set by --seeds"),
        (tiny("jko", overrides=(*TINY, "train.max_minutes=1")), "max_minutes is set by --budget"),
        (tiny("jko", overrides=(*TINY, "velocity.width=9")), "width is set by --parameters"),
        (tiny("jko", overrides=(*TINY, "data.name=rose")), "data.name is set by --data"),
    ]
    for bench, words in cases:
        with pytest.raises(UserError, match=words):
            run(bench, folder)
    with pytest.raises(UserError, match="--parameters is 3"):
        run(tiny("jko", parameters=3), tmp_path / "b")
    assert not (tmp_path / "b").exists()  # so that a right call may use the folder
    assert read_rows(folder) == rows


def test_a_changed_row_is_noticed(finished, tmp_path) -> None:
    folder = shutil.copytree(finished[0], tmp_path / "b")
    path = folder / "8gaussians" / "otflow" / "seed-0" / "row.json"
    path.write_text(path.read_text().replace('"batches": 2', '"batches": 3'))
    with pytest.raises(UserError, match="damaged or foreign"):
        read_rows(folder)
    (fault,) = verify.verify(folder)
    assert fault.path == path and "the same `jkoflow bench`" in str(fault)


def test_a_missing_package_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("pipeline.bench.models.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install 'jkoflow\[zuko\]'"):
        run(tiny("nsf"), tmp_path / "b")


def test_the_command_line(tmp_path) -> None:
    settings = [word for setting in TINY for word in ("--set", setting)]
    call = ["bench", "toy2d", "--models", "otflow", "--data", "gaussian", "--seeds", "1",
            "--budget", "3b", "--parameters", "300", "--test", "50",
            "--run", str(tmp_path / "b")]  # fmt: skip
    result = CliRunner().invoke(app, [*call, *settings], catch_exceptions=False)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == str(tmp_path / "b" / "table.md")
    assert read_rows(tmp_path / "b")[0].batches == 3
    assert read_rows(tmp_path / "b")[0].measured.n == 50
    for words, message in ((["bench", "sounds", "--budget", "3b"], "suite 'sounds' is unknown"),
                           ([*call, "--test", "1"], "--test is 1")):  # fmt: skip
        failed = CliRunner().invoke(app, words)
        assert isinstance(failed.exception, UserError) and message in str(failed.exception)


def test_a_baseline_warms_up_and_is_clipped(tmp_path, monkeypatch) -> None:
    rates, clips, real = [], [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(training_module, "set_learning_rate", lambda _, lr: rates.append(lr))
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda p, most: clips.append(most) or real(p, most)
    )
    settings = (*TINY, "train.warmup=4", "train.lr=0.01", "train.lr_final=1")
    run(tiny("otflow", overrides=settings, budget=Budget(40, "batches")), tmp_path / "b")
    assert rates[:5] == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01]) and set(clips) == {1.0}
