"""Every command on a device gives what it gives on the CPU.

The strict device (`tests.device`) refuses what CUDA or MPS refuse; CUDA itself runs where there is
one. Both go through the same tests.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import jkoflow
from pipeline.runs.run import open_run
from pipeline.storage import atomic
from pipeline.storage.shards.opening import open_store
from tests import device as strict
from tests.pipeline.evaluation.test_metrics import Glimpse
from tests.pipeline.glance import stand_in
from tests.pipeline.tiny import World, pictures, say

#: relative difference from the CPU, which another order of summation explains
TOLERANCE = {strict.NAME: 1e-4, "cuda": 2e-2}
Run = Callable[..., Path]


@pytest.fixture(params=[strict.NAME, pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return request.param


@pytest.fixture
def tolerance(device: str) -> float:
    return TOLERANCE[device]


@pytest.fixture
def on(
    trained: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> Run:
    """Runs a command on a device in a place of its own; returns the place.

    The place is a folder with a copy of the finished run, which was trained on the CPU, and a
    data root without features. `{}` in a word stands for it.
    """

    def run(name: str, *words: str | Path) -> Path:
        place = tmp_path / name
        if not place.exists():
            ignore = shutil.ignore_patterns("features")
            shutil.copytree(trained.home, place / "home", ignore=ignore)
            shutil.copytree(trained.root / "run", place / "run")
        monkeypatch.setenv("JKOFLOW_HOME", str(place / "home"))
        with strict.lent(name):
            given = [str(word).replace("{}", str(place)) for word in words]
            code, out, last = say(capsys, *given, "--device", name)
        assert code == 0, last
        (place / "said").write_text(out)
        return place

    return run


def both(on: Run, device: str, *words: str | Path) -> tuple[Path, Path]:
    """The places after a command on the device and on the CPU."""
    return on(device, *words), on("cpu", *words)


def numbers(value: Any) -> list[float]:
    """The numbers in a value of JSON, in order; no seconds, rates or names."""
    if isinstance(value, dict):
        skipped = ("seconds", "environment", "time", "compute")
        return [x for key in sorted(value) if key not in skipped for x in numbers(value[key])]
    if isinstance(value, list):
        return [x for item in value for x in numbers(item)]
    return [float(value)] if isinstance(value, (int, float)) else []


def assert_same_numbers(a: Path, b: Path, tolerance: float) -> None:
    one, other = (numbers(json.loads(path.read_text())) for path in (a, b))
    assert len(one) == len(other) > 0
    assert one == pytest.approx(other, rel=tolerance, abs=tolerance)


def assert_same_weights(a: Path, b: Path, tolerance: float) -> None:
    """The blocks of two runs have the same weights."""
    one, other = (open_run(path).flow.state_dict() for path in (a, b))
    assert list(one) == list(other)
    for name, value in one.items():
        assert value.device.type == "cpu"
        torch.testing.assert_close(value, other[name], rtol=tolerance, atol=10 * tolerance)


def assert_same_pictures(a: Path, b: Path) -> None:
    """Images differ by one grey level at most."""
    one, other = (np.load(path)["arr_0"] for path in (a, b))
    assert one.shape == other.shape and np.abs(one.astype(float) - other).max() <= 1


# ------------------------------------------------------------------------ images and latents


def test_encode(on: Run, device: str, tolerance: float, trained: World, tmp_path: Path) -> None:
    words = ("encode", "--config", trained.config(), "--out", "{}/latents.npz")
    for name in (device, "cpu"):  # without the cache of the training
        (tmp_path / name / "home").mkdir(parents=True)
    a, b = both(on, device, *words)
    one, other = np.load(a / "latents.npz"), np.load(b / "latents.npz")
    assert sorted(one.files) == sorted(other.files)
    for name in one.files:
        if one[name].dtype.kind == "f":
            np.testing.assert_allclose(one[name], other[name], rtol=tolerance, atol=tolerance)


def test_fid_of_latents_decoded_and_reference(
    on: Run, device: str, tolerance: float, trained: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch)
    words = ("reference", "--config", trained.config(), "{}/reference.safetensors", "--test", "9")
    a, b = both(on, device, *words)
    one, other = (atomic.read_tensors(x / "reference.safetensors") for x in (a, b))
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=tolerance, atol=tolerance)


def test_metrics(
    on: Run, device: str, tolerance: float, trained: World, tmp_path: Path
) -> None:
    torch.jit.script(Glimpse()).save(tmp_path / "glimpse.pt")
    sets = (trained.root / "pictures" / part for part in ("train", "test"))
    a, b = both(on, device, "metrics", *sets, "--features", tmp_path / "glimpse.pt")
    assert_same_numbers(a / "said", b / "said", tolerance)


@pytest.mark.slow
def test_fid(
    on: Run, device: str, tolerance: float, trained: World, inception_weights: Path
) -> None:
    """With the real network: its resizing, its folded convolutions, its pooling."""
    home = trained.home / "assets"
    if not home.exists():
        shutil.copytree(inception_weights.parents[1], home)
    sets = [trained.root / "pictures" / part for part in ("train", "test")]
    a, b = both(on, device, "fid", *sets)
    one, other = (float((x / "said").read_text()) for x in (a, b))
    assert one == pytest.approx(other, rel=max(tolerance, 1e-3))


# ---------------------------------------------------------------------------------- training


def test_train(on: Run, device: str, tolerance: float, trained: World) -> None:
    """As the run that a process on the CPU has trained, block by block."""
    place = on(device, "train", "--config", trained.config(), "--run", "{}/again")
    assert_same_weights(place / "again", trained.root / "run", tolerance)


KINDS = {
    "lfm": {"train": {"objective": "lfm", "optimizer": "muon"}, "matching": {"coupling": "ot"}},
    "fm": {
        "train": {"objective": "fm", "preview_every": 3},
        "velocity": {"kind": "unet", "width": 16, "depth": 1},
    },
    "hutchinson": {
        "jko": {"divergence": "hutchinson", "solver": {"method": "dopri5", "adjoint": True}}
    },
    "exact": {"jko": {"divergence": "exact", "solver": {"method": "rk4", "steps": 1}}},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_train_by_every_objective(
    on: Run, device: str, tolerance: float, kind: str, trained: World
) -> None:
    changes = {} if kind == "fm" else {"schedule": {"max_blocks": 1}}
    changes |= KINDS[kind]
    changes["train"] = {"iterations": 3, **changes.get("train", {})}
    config = trained.config(kind, **changes)
    a, b = both(on, device, "train", "--config", config, "--run", "{}/other")
    assert_same_weights(a / "other", b / "other", 10 * tolerance)


@pytest.mark.slow
def test_train_in_bf16(on: Run, device: str, trained: World) -> None:
    changes = {"objective": "fm", "precision": "bf16", "iterations": 3}
    velocity = {"kind": "unet", "width": 16, "depth": 1}
    config = trained.config("half", train=changes, velocity=velocity)
    a, b = both(on, device, "train", "--config", config, "--run", "{}/half")
    assert_same_weights(a / "half", b / "half", 2e-2)


@pytest.mark.slow
def test_distill(on: Run, device: str, tolerance: float, trained: World) -> None:
    words = ("distill", "--run", "{}/run", "--out", "{}/merged", "--set", "train.iterations=3")
    a, b = both(on, device, *words)
    assert_same_weights(a / "merged", b / "merged", 10 * tolerance)


def test_autoencoder(
    on: Run, device: str, tolerance: float, trained: World, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    stand_in(monkeypatch)
    shape = {"patch": 4, "width": 32, "width_factors": [1], "channels": 2, "codebook": 16}
    recipe = {
        "iterations": 4, "batch_size": 8, "adversarial_start": 2, "lr": 1e-3,
        "discriminator_width": 4, "discriminator_layers": 1,
    }  # fmt: skip
    sections = {"data": trained.settings["data"], "architecture": shape, "training": recipe}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(sections))
    words = ("--config", tmp_path / "recipe.yaml", "--out", "{}/ae")
    a, b = both(on, device, "autoencoder", "train", *words)
    one, other = (atomic.read_tensors(x / "ae" / "autoencoder.safetensors") for x in (a, b))
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=tolerance, atol=10 * tolerance)
    reference = ("--reference", trained.root / "pictures" / "train", "-n", "20")
    a, b = both(on, device, "autoencoder", "evaluate", *words, *reference)
    assert_same_numbers(
        a / "ae" / "autoencoder.json", b / "ae" / "autoencoder.json", 10 * tolerance
    )


@pytest.mark.slow
def test_toy2d(on: Run, device: str, tolerance: float) -> None:
    settings = (
        "velocity.width=8", "velocity.depth=2", "jko.h=[0.5]", "train.iterations=[2]",
        "train.batch_size=64", "points.train=256",
    )  # fmt: skip
    words = [word for setting in settings for word in ("--set", setting)]
    a, b = both(on, device, "toy2d", "--config", "8gaussians", "--run", "{}/toy", *words)
    assert_same_weights(a / "toy", b / "toy", 10 * tolerance)
    samples = Path("toy", "samples", "metrics.json")
    assert_same_numbers(a / samples, b / samples, 1e-2)


@pytest.mark.slow
def test_bench(on: Run, device: str, tolerance: float) -> None:
    settings = ("points.train=300", "train.batch_size=50", "jko.h=[0.5]", "velocity.depth=1")
    words = [word for setting in settings for word in ("--set", setting)]
    models = "jko,fm,ffjord,otflow,ignn,iresnet,scoresde"
    sizes = ("--parameters", "600", "--test", "60", "--seeds", "1", "--budget", "2batches")
    words += ["--models", models, "--data", "8gaussians", *sizes]
    a, b = both(on, device, "bench", "toy2d", "--run", "{}/bench", *words)
    one, other = (nlls(x / "bench" / "table.csv") for x in (a, b))
    assert len(one) == 7 and one == pytest.approx(other, rel=max(10 * tolerance, 1e-2))


def nlls(path: Path) -> list[float]:
    header, *rows = (line.split(",") for line in path.read_text().splitlines())
    return [float(row[header.index("nll")]) for row in rows]


# ---------------------------------------------------------------------------- finished runs


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_generate(on: Run, device: str, method: str) -> None:
    words = ("--out", "{}/grid.png", "--npz", "{}/images.npz", "-n", "6", "--method", method)
    a, b = both(on, device, "generate", "--run", "{}/run", *words)
    assert_same_pictures(a / "images.npz", b / "images.npz")


def test_evaluate(
    on: Run, device: str, tolerance: float, trained: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch)
    reference = trained.root / "pictures" / "train"
    words = ("evaluate", "--run", "{}/run", "--reference", reference, "--kid", "12")
    a, b = both(on, device, *words)
    name = next((a / "run").rglob("metrics*.json")).relative_to(a)
    assert_same_numbers(a / name, b / name, 100 * tolerance)


def test_likelihood(on: Run, device: str, tolerance: float) -> None:
    random = ("--divergence", "hutchinson", "--probes", "3")
    for how in ((), random):
        a, b = both(on, device, "likelihood", "--run", "{}/run", "-n", "4", *how)
        names = [path.relative_to(a) for path in (a / "run").rglob("likelihood*.json")]
        for name in names:
            assert_same_numbers(a / name, b / name, 10 * tolerance)
        assert names


def test_images_through_a_flow(on: Run, device: str, tolerance: float, trained: World) -> None:
    """`invert` and `interpolate`."""
    test = trained.root / "pictures" / "test"
    words = ("--npz", "{}/noise.npz", "--out", "{}/a.png", "--animation", "{}/a.gif", "-n", "2")
    a, b = both(on, device, "invert", "--run", "{}/run", *words)
    one, other = (np.load(place / "noise.npz")["arr_0"] for place in (a, b))
    np.testing.assert_allclose(one, other, rtol=10 * tolerance, atol=10 * tolerance)
    words = (test / "000.png", test / "001.png", "-n", "3", "--out", "{}/b.png")
    a, b = both(on, device, "interpolate", "--run", "{}/run", *words)
    assert_near(a / "b.png", b / "b.png")


@pytest.mark.slow
def test_edit(on: Run, device: str, tmp_path: Path) -> None:
    """With a shipped run, which has classes, guidance and a sampler of its own."""
    Image.fromarray(pictures(1, 5, 28)[0]).save(tmp_path / "blob.png")
    words = (tmp_path / "blob.png", "--class", "0", "--to", "3", "--steps", "1")
    a, b = both(on, device, "edit", "--run", "zoo:mnist-classes", *words, "--out", "{}/c.png")
    assert_near(a / "c.png", b / "c.png")


def assert_near(a: Path, b: Path) -> None:
    """Pictures differ by one grey level at most."""
    one, other = (np.asarray(Image.open(path).convert("L"), float) for path in (a, b))
    assert one.shape == other.shape and np.abs(one - other).max() <= 1


@pytest.mark.slow
def test_a_run_of_the_device_opens_everywhere(on: Run, device: str, trained: World) -> None:
    """Its stages and its weights are tensors of the host, and it samples on the CPU."""
    config = trained.config(schedule={"max_blocks": 1}, train={"iterations": 1})
    place = on(device, "train", "--config", config, "--run", "{}/new")
    stages = sorted((place / "new" / "stages").iterdir())
    assert stages and open_store(stages[0], "stage").shard(0)["z"].device.type == "cpu"
    words = ("--npz", "{}/a.npz", "-n", "4", "--out", "{}/a.png")
    on(device, "generate", "--run", "{}/new", *words)
    words = ("--npz", "{}/b.npz", "-n", "4", "--out", "{}/b.png")
    on("cpu", "generate", "--run", place / "new", *words)
    assert_same_pictures(place / "a.npz", place.parent / "cpu" / "b.npz")


@pytest.mark.slow
def test_the_package(on: Run, device: str, tolerance: float, trained: World) -> None:
    """`jkoflow.load(…).to(device)` takes and returns what it does on the CPU."""
    with strict.lent(device):
        host = jkoflow.load(trained.root / "run", device="cpu")
        images = host.sample(3, seed=1)
        z = host.encode(images)
        expected = host.decode(z), host.invert(images).noise, host.log_prob(images).value
        there = host.to(device)
        assert (there.sample(3, seed=1).cpu().int() - images.int()).abs().max() <= 1
        found = there.decode(z), there.invert(images).noise, there.log_prob(images).value
    for one, other in zip(found, expected, strict=True):
        limit = 1 if other.dtype == torch.uint8 else 10 * tolerance
        torch.testing.assert_close(one.cpu().float(), other.float(), rtol=limit, atol=limit)


@pytest.mark.slow
def test_report(on: Run, device: str) -> None:
    a, b = both(on, device, "report", "--run", "{}/run", "--neighbours", "2")
    assert (a / "run" / "report.html").stat().st_size == (b / "run" / "report.html").stat().st_size
