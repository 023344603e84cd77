"""`jkoflow bench images`: rows with FID and KID, sizes, searches, failures and mistakes."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from typer.testing import CliRunner

from autoencoders.base import to_uint8
from flows.baselines.base import Decoded
from flows.baselines.cnf import FlowModel
from flows.baselines.registry import config_from_dict, make_baseline
from pipeline.bench import bench as bench_module
from pipeline.bench import measure as measure_module
from pipeline.bench.bench import Bench
from pipeline.bench.budget import Budget
from pipeline.bench.folder import read_rows
from pipeline.bench.images import _others
from pipeline.bench.measure import measure
from pipeline.bench.models import SizeError, blockwise_config, parameter_count, width_for
from pipeline.bench.problem import HeldOut, batch_of, open_problem, problem_config
from pipeline.bench.results import Row
from pipeline.cli.main import app
from pipeline.config.load import load_config
from pipeline.config.rules.validate import check
from pipeline.config.schema import Config
from pipeline.data.datasets import load_images
from pipeline.errors import JkoflowError, UserError
from pipeline.evaluation.likelihood import held_out_nll
from pipeline.evaluation.real_images import subset_indices
from pipeline.runs.run import open_run
from pipeline.storage import atomic
from tests.flows.problems import fresh_flow
from tests.pipeline.bench.test_bench import CPU, files, run
from tests.pipeline.glance import stand_in
from tests.pipeline.tiny import SIDE, make_world

FEW = HeldOut(test=12)
MODELS = ("jko", "otflow")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Iterator[Path]:
    """A world with a data root of its own, and the stand-in for Inception."""
    world = make_world(tmp_path_factory.mktemp("images"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JKOFLOW_HOME", str(world.home))
        stand_in(patch)
        yield world.root


def settings(root: Path) -> tuple[str, ...]:
    return (
        "data.name=folder", f"data.path={root / 'pictures'}", f"data.size={SIDE}", "data.mode=L",
        f"autoencoder.weights={root / 'autoencoder.safetensors'}", "latents.shard_size=16",
        "latents.batch_size=8", "velocity.depth=1", "velocity.time_features=4", "jko.h=[0.5]",
        "jko.solver.steps=1", "train.batch_size=16", "evaluate.n=20",
        f"evaluate.reference={root / 'pictures' / 'test'}",
    )  # fmt: skip


def bench(root: Path, *models: str, **changes) -> Bench:
    values = {"data": ("mnist",), "budget": Budget(2, "batches"), "seeds": 1, "parameters": 3000,
              "overrides": settings(root), "held_out": FEW}  # fmt: skip
    return Bench("images", models, **{**values, **changes})


def config_of(root: Path) -> Config:
    return problem_config("images", "mnist", settings(root), 0)


@pytest.fixture(scope="module")
def finished(root) -> tuple[Path, list[Row]]:
    return root / "bench", run(bench(root, *MODELS), root / "bench", plots=True)


def test_every_model_has_a_row_of_images(finished) -> None:
    folder, rows = finished
    assert [row.model for row in rows] == list(MODELS)
    for row in rows:
        assert row.error is None and row.measured is not None
        assert row.batches == 2 and 0 < row.parameters <= 3000
        images = row.measured.images
        assert images is not None and images.n == row.measured.compare == 20
        assert math.isfinite(images.fid) and images.fid == images.few_fid and images.fid_error > 0
        assert images.kid_n == 20 and math.isfinite(images.kid) and images.kid_error > 0
        assert images.split == "test" and 0 < images.floor
        assert row.measured.n == 12 and row.measured.mmd_m is None and row.measured.nfe > 0
    assert len({row.measured.images.floor for row in rows}) == 1
    text = (folder / "table.md").read_text()
    assert "| model | NLL (nats / dim) | FID | KID |" in text and "MMD" not in text
    assert "40 latents 2x3x3 of folder; NLL of 12 images of its test split. FID(n=20)" in text
    with (folder / "table.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [float(line["fid"]) for line in read] == [r.measured.images.fid for r in rows]
    for name in ("nll", "fid", "samples"):
        with Image.open(folder / "plots" / f"mnist-{name}.png") as picture:
            assert min(picture.size) > 100
    assert not (folder / "plots" / "mnist-mmd.png").exists()
    assert not list(folder.rglob("stage-*"))


def test_the_likelihood_is_that_of_evaluate(finished) -> None:
    folder, rows = finished
    measured = rows[0].measured
    trained = open_run(folder / "mnist" / "jko" / "seed-0" / "training")
    assert trained.flow.shape == (2, 3, 3) and trained.flow.classes == 0
    metrics = held_out_nll(trained, 12, Accelerator(cpu=True))
    assert metrics["nll_per_dim"] == pytest.approx(measured.nll, rel=1e-5)
    assert metrics["nll"]["image_error"] == pytest.approx(measured.nll_error, rel=1e-4)
    points = rows[0].curve
    assert len(points) == 1 and points[0].fid is not None and points[0].mmd_m is None


def test_a_saved_baseline_is_the_measured_model(root, finished) -> None:
    folder, rows = finished
    cell = folder / "mnist" / "otflow" / "seed-0"
    described = json.loads((cell / "model.json").read_text())
    model = make_baseline(
        "otflow", config_from_dict("otflow", described["config"]), described["dim"]
    )
    model.load_state_dict(atomic.read_tensors(cell / "model.safetensors"))
    problem = open_problem(config_of(root), FEW)
    again, images = measure(model, problem, CPU)
    measured = next(row.measured for row in rows if row.model == "otflow")
    assert again.nll == pytest.approx(measured.nll, rel=1e-5)
    assert again.images.fid == pytest.approx(measured.images.fid, rel=1e-2)
    kept = atomic.read_tensors(cell / "samples.safetensors")
    assert kept["samples"].dtype == torch.uint8 and kept["samples"].shape == (16, 1, SIDE, SIDE)
    assert (kept["samples"].int() - images[:16].int()).abs().max() <= 1
    assert kept["data"].shape == kept["samples"].shape


def test_rows_are_added_and_none_is_repeated(root, finished) -> None:
    folder, rows = finished
    kept = files(folder / "mnist")
    more = run(bench(root, "jko", "fm"), folder)
    assert [row.model for row in more] == ["jko", "fm", "otflow"]
    assert kept.items() <= files(folder / "mnist").items() and rows[0] in more


def test_the_identity_samples_decoded_noise(root, monkeypatch) -> None:
    problem = open_problem(config_of(root), FEW)
    model = FlowModel(fresh_flow((2, 3, 3), []))
    model.flow.register_parameter("unused", torch.nn.Parameter(torch.zeros(1)))
    measured, images = measure(model, problem, CPU)
    nll = problem.test.double().square().sum(1) / 36 + math.log(2 * math.pi) / 2
    assert measured.nll == pytest.approx(float(nll.mean()), rel=1e-6)
    seen = []
    draw = model.draw_noise
    monkeypatch.setattr(model, "draw_noise", lambda *given: seen.append(draw(*given)) or seen[0])
    measure(model, problem, CPU)
    latents = problem.pictures.cache.standardisation.undo(seen[0].unflatten(1, (2, 3, 3)))
    assert torch.equal(images, to_uint8(problem.pictures.autoencoder.decode(latents)))
    monkeypatch.setattr(measure_module, "EXACT_UP_TO", 1)
    probed, _ = measure(model, problem, CPU)
    assert model.probes == 16 and probed.nll == pytest.approx(measured.nll, rel=1e-6)


def test_a_sample_without_an_inverse_is_white_and_left_out(root, monkeypatch) -> None:
    problem = open_problem(config_of(root), FEW)
    model = FlowModel(fresh_flow((2, 3, 3), []))
    model.flow.register_parameter("unused", torch.nn.Parameter(torch.zeros(1)))

    def half(noise):
        keep = torch.arange(len(noise)) % 2 == 0
        return Decoded(torch.where(keep[:, None], noise, torch.nan), keep, 7)

    _, whole = measure(model, problem, CPU)
    monkeypatch.setattr(model, "decode_checked", half)
    measured, images = measure(model, problem, CPU)
    assert measured.failures == 0.5 and measured.images.n == 10 and measured.compare == 20
    assert (images[1::2] == 255).all() and torch.equal(images[::2], whole[::2])
    nothing = lambda noise: Decoded(noise, torch.zeros(len(noise), dtype=torch.bool), 7)  # noqa: E731
    monkeypatch.setattr(model, "decode_checked", nothing)
    assert measure(model, problem, CPU)[0].images is None


def test_batches_are_drawn_from_the_posterior(root, tmp_path) -> None:
    config = config_of(root)
    problem = open_problem(config, FEW)
    stage = problem.source.first_stage(tmp_path, config, Accelerator(cpu=True))
    rows = torch.arange(6)
    draws = [batch_of(stage, rows, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert draws[0].shape == (6, 18) and torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    mean, std = (stage.take(name, rows).flatten(1) for name in ("mean", "std"))
    assert ((draws[2] - mean).abs() <= 6 * std).all()


# ---------------------------------------------------------------- configurations and sizes


def test_a_configuration_of_flow_matching_has_all_objectives() -> None:
    config = problem_config("images", "cifar10", (), 0)
    assert config.velocity.classes == 0 and config.train.precision == "fp32"
    shape = (11, 8, 8)
    for name in ("jko", "lfm", "fm"):
        width = width_for(name, config, shape, 400_000)
        assert width % config.velocity.heads == 0
        count = parameter_count(name, config, shape, width)
        wider = parameter_count(name, config, shape, width + config.velocity.heads)
        assert count <= 400_000 < wider
        made = blockwise_config(config, name, width, 100)
        check(made)
        assert made.train.optimizer == "muon" and made.train.objective == name
        assert name == "jko" or made.matching.times == "logit-normal"
    with pytest.raises(SizeError, match="--parameters is 500, but jko of width 4"):
        width_for("jko", config, shape, 500)


def test_every_packaged_flow_is_a_data_set_or_a_refiner() -> None:
    for name in bench_module.DEFAULTS["images"]:
        assert problem_config("images", name, (), 0).name == name
    for name in ("cifar10-refiner", "imagenet32-refiner"):
        assert load_config(name).velocity.image_channels
        with pytest.raises(UserError, match="is of a refiner"):
            problem_config("images", name, (), 0)


# ---------------------------------------------------------------- search and failures


def test_the_search_uses_other_images(root, tmp_path) -> None:
    images = load_images(config_of(root).data.of_split("test"))
    used = subset_indices(images, 12)
    others = _others(images, used)
    assert len(others) == 12 and not set(used) & set(others)
    search = bench(root, "otflow", rates=(1e-9, 0.05)).open_search()
    assert search.pictures is None and search.test.shape == (12, 18) and search.samples == 0
    assert not torch.equal(search.test, open_problem(config_of(root), FEW).test)
    with pytest.raises(UserError, match="--test is 24 of 24 held-out images; expected at least 2"):
        bench(root, "otflow", held_out=HeldOut(test=30)).open_search()
    rows = run(bench(root, "otflow", rates=(1e-9, 0.05)), tmp_path / "b")
    assert rows[0].error is None and rows[0].lr in (1e-9, 0.05)
    assert "tried with 1 batches on mnist (NLL)" in (tmp_path / "b" / "table.md").read_text()


def test_a_model_that_does_not_fit_is_a_row(root, tmp_path) -> None:
    rows = run(bench(root, "otflow", "iresnet", parameters=300), tmp_path / "b")
    assert {row.model: row.error is None for row in rows} == {"otflow": True, "iresnet": False}
    assert "--parameters is 300, but iresnet of width 1 has" in rows[1].error
    assert "| i-ResNet | failed | – |" in (tmp_path / "b" / "table.md").read_text()


def test_a_failed_training_leaves_the_other_rows(root, tmp_path, monkeypatch) -> None:
    real = bench_module.measure

    def broken(model, *rest, **words):
        if isinstance(model, FlowModel):
            raise JkoflowError("the NLL of 3 of 12 held-out samples is not finite; lower it")
        return real(model, *rest, **words)

    monkeypatch.setattr(bench_module, "measure", broken)
    rows = run(bench(root, "otflow", "ignn"), tmp_path / "b", plots=True)
    assert {row.model: row.error is None for row in rows} == {"otflow": False, "ignn": True}


def test_mistakes_are_one_sentence_and_leave_rows(root, finished, tmp_path) -> None:
    folder, _ = finished
    before = read_rows(folder)
    short = settings(root)[:-2]
    cases = [
        (bench(root, "jko", "glow"), "model 'glow' is unknown"),
        (bench(root, "jko", data=("rose",)), "data set 'rose' is not in images"),
        (bench(root, "jko", data=("cifar10-refiner",)), "refiner|has no effect|applies to"),
        (bench(root, "jko", budget=Budget(9, "batches")), "budget of the benchmark"),
        (bench(root, "jko", parameters=3), "parameters of the benchmark"),
    ]
    for wrong, words in cases:
        with pytest.raises(UserError, match=words):
            run(wrong, folder)
    assert read_rows(folder) == before
    fresh = [
        (bench(root, "jko", parameters=3), "--parameters is 3, but jko of width 1"),
        (bench(root, "jko", overrides=(*short, "evaluate.n=41")), "evaluate.n|41 images"),
        (bench(root, "jko", overrides=(*short, "evaluate.n=1")), "at least 2 images"),
        (bench(root, "jko", overrides=(*short, "evaluate.n=5", "evaluate.reference=none")),
         "evaluate.reference: 'none' is neither a path"),
        (bench(root, "jko", overrides=("data.name=latents", f"data.path={root}")),
         "data.name is latents; expected images"),
    ]  # fmt: skip
    for index, (wrong, words) in enumerate(fresh):
        with pytest.raises(UserError, match=words):
            run(wrong, tmp_path / str(index))


def test_a_budget_of_zero_is_one_sentence(tmp_path) -> None:
    call = ["bench", "images", "--budget", "0s", "--run", str(tmp_path / "b")]
    failed = CliRunner().invoke(app, call)
    assert isinstance(failed.exception, UserError) and "more than 0" in str(failed.exception)
    assert np.all([not (tmp_path / "b").exists()])
