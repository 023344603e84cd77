"""`jkoflow bench`: rows, resuming, failures, budgets, sizes, and mistakes."""

from __future__ import annotations

import csv
import dataclasses
import io
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

from flows.baselines.base import Decoded
from flows.baselines.cnf import FlowModel
from flows.baselines.ignn import Ignn, IgnnConfig
from flows.baselines.iresnet import IResNet, IResNetConfig
from flows.baselines.registry import config_from_dict, make_baseline
from flows.baselines.residual import FixedPoint
from flows.likelihood import log_prob
from flows.networks.config import VelocityConfig
from flows.solving.solver import SolverConfig
from flows.spec import BlockSpec
from pipeline.bench import bench as bench_module
from pipeline.bench import measure as measure_module
from pipeline.bench.bench import Bench, read_rows, run_bench
from pipeline.bench.budget import Budget
from pipeline.bench.measure import Measured, measure
from pipeline.bench.models import (
    AUTOREGRESSIVE,
    BLOCKWISE,
    TITLES,
    blockwise_config,
    parameter_count,
    width_for,
)
from pipeline.bench.problem import HeldOut, open_problem, problem_config
from pipeline.bench.results import Row, markdown, table_csv
from pipeline.cli.main import app
from pipeline.config.load import with_values
from pipeline.errors import JkoflowError, UserError
from pipeline.evaluation.likelihood import PROBES, summarise
from pipeline.runs import verify
from pipeline.runs.run import open_run
from pipeline.runtime import signals
from pipeline.runtime.rng import generator
from pipeline.storage import atomic
from tests.flows.problems import fresh_flow

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


def test_a_saved_baseline_is_the_measured_model(finished) -> None:
    folder, rows = finished
    problem = open_problem(problem_config("toy2d", "8gaussians", TINY, 0), FEW)
    for row in rows[3:]:
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


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("suite", [("toy2d", "rose", 2, 35_000), ("tabular", "power", 6, 76_000)])
def test_models_have_at_most_the_parameters_that_are_wanted(name, suite) -> None:
    config = problem_config(suite[0], suite[1], (), 0)
    shape = (suite[2],)
    width = width_for(name, config, shape, suite[3])
    count = parameter_count(name, config, shape, width)
    assert 0.9 * suite[3] < count <= suite[3] < parameter_count(name, config, shape, width + 1)


def test_batches_are_split_over_blocks() -> None:
    config = problem_config("toy2d", "rose", (), 0)
    assert config.train.iterations == [2000, 1200, 1000, 1000]
    jko = blockwise_config(config, "jko", 8, 521)
    assert sum(jko.train.iterations) == 521 and jko.train.iterations[1:] == [120, 100, 100]
    assert jko.velocity.autonomous and jko.schedule.tolerance == 0
    assert config.train.warmup == 50 and jko.train.warmup == 10
    lfm = blockwise_config(config, "lfm", 8, 400)
    assert lfm.train.iterations == [100] * 4 and lfm.schedule.max_blocks == 3 and lfm.jko is None
    fm = blockwise_config(config, "fm", 8, 400)
    assert fm.train.iterations == [400] and not fm.velocity.autonomous
    assert fm.train.warmup == 40 and blockwise_config(config, "fm", 8, 900).train.warmup == 50
    with pytest.raises(UserError, match="3 batches for 4 blocks"):
        blockwise_config(config, "jko", 8, 3)
    again = with_values(config, {"jko.reparameterize": 2, "jko.later_iterations": 7})
    three = blockwise_config(again, "jko", 8, 1563)
    assert three.train.iterations == jko.train.iterations and three.jko.later_iterations is None
    assert blockwise_config(again, "fm", 8, 400).train.iterations == [400]
    with pytest.raises(UserError, match="11 batches for 4 blocks of jko in 3 passes"):
        blockwise_config(again, "jko", 8, 11)
    with pytest.raises(UserError, match="jko.refine is 2; expected 1"):
        blockwise_config(with_values(config, {"jko.refine": 2}), "jko", 8, 400)


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


# ---------------------------------------------------------------- measuring


def identity(dim: int) -> FlowModel:
    """A flow that leaves its samples unchanged."""
    model = FlowModel(fresh_flow((dim,), []))
    model.flow.register_parameter("unused", torch.nn.Parameter(torch.zeros(1)))
    return model


def test_the_identity_measures_as_the_normal_distribution() -> None:
    problem = open_problem(problem_config("toy2d", "gaussian", (), 0), HeldOut(400, 500))
    model = identity(2)
    measured, samples = measure(model, problem, CPU)
    nll = problem.test.double().square().sum(1) / 2 + math.log(2 * math.pi)
    assert measured.nll == pytest.approx(float(nll.mean()), rel=1e-6)
    assert measured.nll_error == pytest.approx(float(nll.std()) / 20, rel=1e-5)
    assert len(samples) == 500 and measured.failures == 0
    assert measured.mmd_m > measured.thresholds[0] and measured.mmd_1 > measured.thresholds[1]
    scaled = dataclasses.replace(problem, log_scale=-3.5)
    assert measure(model, scaled, CPU)[0].nll == pytest.approx(measured.nll - 3.5)


def test_random_probes_have_their_part_of_the_error(monkeypatch) -> None:
    problem = open_problem(problem_config("toy2d", "gaussian", TINY, 0), FEW)
    network = VelocityConfig("mlp", 8, 1, autonomous=True, zero_init=False)
    spec = BlockSpec(network, SolverConfig("rk4", 2))
    flow = fresh_flow((2,), [spec])
    exact, _ = measure(FlowModel(flow), problem, CPU)
    assert exact.probe_error is None
    monkeypatch.setattr(measure_module, "EXACT_UP_TO", 1)
    measured, _ = measure(FlowModel(flow), problem, CPU)
    known = log_prob(flow, problem.test, "hutchinson", PROBES, generator=generator(
        0, "nll", "probes"))  # fmt: skip
    assert measured.probe_error == pytest.approx(summarise([known])["probe_error"] * 2)
    assert abs(measured.nll - exact.nll) < 5 * measured.probe_error + 1e-6


def test_samples_without_an_inverse_are_counted_and_left_out(monkeypatch) -> None:
    problem = open_problem(problem_config("toy2d", "gaussian", TINY, 0), FEW)
    model = Ignn(IgnnConfig(VelocityConfig("mlp", 8, 1, autonomous=True), 1), 2)
    whole, samples = measure(model, problem, CPU)

    def half(noise):
        keep = torch.arange(len(noise)) % 2 == 0
        return Decoded(torch.where(keep[:, None], noise, torch.nan), keep, 7)

    monkeypatch.setattr(model, "decode_checked", half)
    measured, found = measure(model, problem, CPU)
    assert whole.failures == 0 and measured.failures == 0.5
    torch.testing.assert_close(found, samples[::2])
    nothing = lambda noise: Decoded(noise, torch.zeros(len(noise), dtype=torch.bool), 7)  # noqa: E731
    monkeypatch.setattr(model, "decode_checked", nothing)
    measured, _ = measure(model, problem, CPU)
    assert measured.mmd_m is None and measured.mmd_1 is None and measured.failures == 1
    # one iteration is too few for any sample
    model = IResNet(IResNetConfig(8, blocks=2, fixed_point=FixedPoint(1e-9, 1)), 2)
    measured, _ = measure(model, problem, CPU)
    assert measured.mmd_m is None and measured.failures == 1 and math.isfinite(measured.nll)
    text = markdown([row("iresnet", 0, 1.0, measured=measured)], [])
    assert "i-ResNet, seed 0: the inverse of 100.00% of 40 samples was not found" in text
    assert "changes no coordinate by more than 1e-05; the median of ‖z − T⁻¹(T(z))‖ is" in text


# ---------------------------------------------------------------- tables


def row(model: str, seed: int, nll: float, **changes) -> Row:
    measured = Measured(nll, 0.25, 1e-3 * (seed + 1), None, [1e-3], 0.125, 0.0, 9, 60, 40)
    values = {"parameters": 1234, "seconds": 2.0, "batches": 4, "measured": measured}
    return Row("power", model, seed, "rows", **{**values, **changes})


def test_the_table_has_means_and_deviations() -> None:
    rows = [row("jko", 0, 1.0, overhead=0.5), row("jko", 1, 2.0), row("otflow", 0, 3.0),
            row("fm", 0, 0.0, measured=None, error="no luck")]  # fmt: skip
    text = markdown(rows, ["Settings."], published=True)
    line = "| JKO-iFlow | 1.500 ± 0.707 | 1.50e-03 ± 7.07e-04 | – | 1,234 | 2.0 + 0.2 | 4 |"
    assert line in text
    assert "| OT-Flow | 3.000 (± 0.250) | 1.00e-03 | – |" in text
    assert "| flow matching | failed |" in text and "seed 0: failed: no luck" in text
    assert "JKO-iFlow, seed 1: the inverse of 12.50% of 40 samples was not found" in text
    assert "| *JKO-iFlow, published* | -0.12 |" in text and "arXiv:2212.14424" in text
    assert "published" not in markdown(rows, []) and "fixed point" not in text
    noisy = dataclasses.replace(rows[0].measured, probe_error=0.0123)
    text = markdown([row("jko", 0, 1.0, measured=noisy)], [])
    assert "The random probes have at most 0.01 of the standard error" in text
    lines = list(csv.DictReader(io.StringIO(table_csv(rows))))
    assert lines[0]["seconds_per_batch"] == "0.5" and lines[3]["error"] == "no luck"
    assert lines[3]["nll"] == "" and lines[1]["failures"] == "0.125"


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
