"""`jkoflow toy2d`: a tiny experiment start to finish, resumed, and its mistakes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from typer.testing import CliRunner

from flows.networks.config import VelocityConfig
from flows.spec import BlockSpec
from pipeline.cli.main import app
from pipeline.config import packaged
from pipeline.config.load import load_config
from pipeline.errors import JkoflowError, UserError
from pipeline.runs.run import open_run
from pipeline.storage import atomic
from pipeline.toy2d.experiment import measure_flow, run_experiment
from pipeline.toy2d.figures import grid_centres
from pipeline.toy2d.point_sets import POINTS
from pipeline.toy2d.point_source import PointSource
from tests.flows.problems import fresh_flow

TINY = [
    "velocity.width=8", "velocity.depth=2",
    "jko.h=[0.5]",
    "train.iterations=[3,2]",
    "train.batch_size=64",
    "points.train=256",
]


def load(name, overrides=()):
    return load_config(name, overrides, packaged.TOY2D)


def tiny(name="gaussian", *more, **counts):
    config = load(name, [*TINY, *more])
    points = dataclasses.replace(config.points, **{"test": 64, "compare": 50, "grid": 8, **counts})
    return dataclasses.replace(config, points=points)


def run(config, folder, resume=False):
    accelerator = Accelerator(cpu=True)
    return run_experiment(config, folder, accelerator, lambda items, *_: items, resume)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "run"
    return folder, run(tiny(), folder)


def test_every_point_set_has_its_configuration():
    names = set(packaged.available(packaged.TOY2D))
    assert names == set(POINTS)
    for name in names:
        config = load(name)
        assert config.data.name == name == config.name
        assert config == load(f"toy2d/{name}")
        PointSource(config)


def test_a_run_writes_pictures_and_metrics(finished):
    folder, metrics = finished
    samples = folder / "samples"
    for name in ("samples", "density", "trajectories", "movement"):
        with Image.open(samples / f"{name}.png") as picture:
            assert min(picture.size) > 100
    with Image.open(samples / "trajectories.gif") as film:
        # one block of four states, and the free block, which is not split: there and back
        assert film.n_frames >= 2 * (4 + 1)
    assert json.loads((samples / "metrics.json").read_text()) == metrics
    assert math.isfinite(metrics["nll_per_dim"]) and metrics["inversion_mse"] < 1e-5
    assert metrics["nll"]["n"] == 64 and metrics["mmd"]["n"] == 50 and metrics["nfe"] > 0
    assert [row["h"] for row in metrics["blocks"]] == [0.5, None]
    assert set(metrics["seconds"]) == {"train", "measure"}
    assert not list(folder.rglob(f"{atomic.TEMPORARY_PREFIX}*"))


def test_a_resumed_run_equals_an_uninterrupted_one(finished, tmp_path):
    config = tiny("gaussian", "train.max_minutes=1e-9")
    metrics, calls = None, 0
    while metrics is None:
        metrics = run(config, tmp_path / "run", resume=calls > 0)
        calls += 1
    assert calls > 2
    whole = finished[1]
    for key in ("nll_per_dim", "mmd", "inversion_mse", "nfe"):
        assert metrics[key] == whole[key]


def test_a_run_is_not_overwritten(finished):
    with pytest.raises(UserError, match="--resume"):
        run(tiny(), finished[0])


def test_an_unfinished_run_is_finished_by_its_own_command(tmp_path):
    config = tiny("gaussian", "train.max_minutes=1e-9")
    with contextlib.suppress(JkoflowError):
        run(config, tmp_path / "run")
    with pytest.raises(UserError, match=r"`jkoflow toy2d --run .*run --resume`"):
        open_run(tmp_path / "run")


def test_a_resumed_run_keeps_its_points(finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    for change in ("points.train=77", "train.seed=5"):
        with pytest.raises(UserError, match=f"started with {change.partition('=')[0]}="):
            run(tiny("gaussian", change), folder, resume=True)
    measured = run(tiny("gaussian", test=50), folder, resume=True)
    assert measured["nll"]["n"] == 50


def test_metrics_of_the_identity_flow_equal_closed_forms():
    """z = x: NLL is E[½‖x‖² + log 2π] / 2, the gap KL(N(0, Σ) ‖ N(0, I)) / 2; MMD sees it."""
    flow = fresh_flow((2,), [BlockSpec(VelocityConfig("mlp", width=4, depth=1))])
    source = PointSource(tiny("gaussian", test=4000, compare=400))
    metrics = measure_flow(flow, source, torch.device("cpu"))
    x = source.sample("test", 0, 4000).double()
    each = (x.square().sum(dim=1) / 2 + math.log(2 * math.pi)) / 2
    nll = each.mean()
    error = float(each.std()) / math.sqrt(4000)
    assert metrics["nll"]["point_error"] == pytest.approx(error, rel=1e-4)
    assert metrics["nll_per_dim"] == pytest.approx(float(nll), rel=1e-5)
    entropy = math.log(2 * math.pi * math.e) / 2 + math.log(24) / 4
    assert metrics["entropy_per_dim"] == pytest.approx(entropy, abs=0.03)
    assert metrics["nll_gap_per_dim"] == pytest.approx((14 - 2 - math.log(24)) / 4, rel=0.08)
    for name in ("0.1*median", "median", "1"):
        row = metrics["mmd"][name]
        assert row["value"] > 2 * row["threshold"]
    widths = [metrics["mmd"][name]["bandwidth"] for name in ("0.1*median", "median", "1")]
    assert widths[0] == pytest.approx(0.1 * widths[1]) and widths[2] == 1
    assert metrics["inversion_mse"] < 1e-10


def test_points_outside_the_support_are_left_out():
    flow = fresh_flow((2,), [BlockSpec(VelocityConfig("mlp", width=4, depth=1))])
    source = PointSource(tiny("gaussian", test=200, compare=50))
    whole = measure_flow(flow, source, torch.device("cpu"))
    known = source.points.log_density
    density = lambda x: known(x).index_fill(0, torch.tensor([7]), -math.inf)  # noqa: E731
    source.points = dataclasses.replace(source.points, log_density=density)
    metrics = measure_flow(flow, source, torch.device("cpu"))
    for key in ("entropy_per_dim", "nll_gap_per_dim"):
        assert metrics[key] == pytest.approx(whole[key], abs=0.05) and metrics[key] != whole[key]


def test_points_of_each_use_differ_and_repeat():
    source = PointSource(tiny())
    first, again = source.sample("test", 0, 10), PointSource(tiny()).sample("test", 0, 10)
    assert torch.equal(first, again)
    assert not torch.equal(first, source.sample("compare", 0, 10))
    other = PointSource(tiny("gaussian", "train.seed=1"))
    assert not torch.equal(first, other.sample("test", 0, 10))
    assert other.fingerprint != source.fingerprint
    standardisation = source.manifest("points").standardisation.to_dict()
    assert standardisation == {"mean": [0.0, 0.0], "std": [1.0, 1.0]}


def test_grid_centres_run_along_x_first():
    grid = grid_centres(3, (-3.0, 3.0))
    assert grid[:4].tolist() == [[-2, -2], [0, -2], [2, -2], [-2, 0]]


def test_the_command_trains_measures_and_plots(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sets = [word for value in TINY for word in ("--set", value)]
    result = CliRunner().invoke(app, ["toy2d", "-c", "toy2d/gaussian", *sets])
    assert result.exception is None, result.exception
    assert result.stdout.strip().endswith("runs/toy2d-gaussian/samples")
    assert "NLL" in result.stderr and "τ" in result.stderr and "entropy 2.2" in result.stderr


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: load("chess"), "unknown configuration 'chess' in toy2d; .*checkerboard"),
        (lambda: load("mnist"), "flows/mnist is for `jkoflow encode, train`"),
        (lambda: load("rose", ["points.n=3"]), "unknown key points.n"),
        (lambda: tiny("gaussian", "points.train=1"), "points.train is 1; expected at least 2"),
        (lambda: PointSource(tiny("gaussian", "data.name=moon")), "point set 'moon' is unknown"),
        (lambda: PointSource(tiny("gaussian", "data.name=picture")), "data.path is null"),
    ],
)
def test_invalid_settings_are_one_sentence(call, words):
    with pytest.raises(UserError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_picture_file_is_a_point_set(tmp_path):
    """A file given by path trains like any set, and another file is another experiment."""
    path = tmp_path / "ink.png"
    Image.linear_gradient("L").save(path)
    config = tiny("rose", "data.name=picture", f"data.path={path}")
    source = PointSource(config)
    assert source.sample("test", 0, 2000)[:, 1].mean() > 1  # the dark half lies on top
    before = source.fingerprint
    Image.linear_gradient("L").rotate(180).save(path)
    assert PointSource(config).fingerprint != before
