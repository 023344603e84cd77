"""Refiners: training data, refined images, metrics, export and mistakes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from autoencoders.base import to_float, to_uint8
from flows.networks.condition import Condition
from flows.objectives.losses import LfmLoss
from pipeline.data.datasets import load_images
from pipeline.runs.directory import read_manifest, write_manifest
from pipeline.runs.run import is_refiner, open_run
from pipeline.runtime.rng import generator
from pipeline.sampling.refiner import Refiner
from pipeline.sampling.sampling_plan import SamplingPlan, differences, with_guidance
from pipeline.storage.shards.opening import open_store
from pipeline.training.batches.matching_loss import IMAGE, batch_loss
from pipeline.training.sources import ResidualSource
from tests.pipeline.drawing import images, plan_of
from tests.pipeline.glance import stand_in
from tests.pipeline.records import rewrite
from tests.pipeline.tiny import World, run_child, say, write_autoencoder

SECTIONS: dict[str, Any] = {
    "velocity": {"kind": "conv", "width": 8, "depth": 1, "image_channels": 1},
    "train": {"objective": "fm", "iterations": 4},
    "sampler": {"method": "midpoint", "steps": 3},
    "latents": {"disturb": 0.2, "mirror": False},
}


@pytest.fixture(scope="module")
def refiner_home(trained_world: World) -> Path:
    """Train a refiner for the autoencoder of the trained run."""
    folder = trained_world.root / "refiner-run"
    config = trained_world.config("fine", **SECTIONS)
    run_child("train", "-c", config, "--set", "name=fine", "-r", folder,
              env=trained_world.environment)  # fmt: skip
    return folder


@pytest.fixture
def refiner(refiner_home: Path, run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(refiner_home, tmp_path / "fine"))


def test_a_refiner_trains_on_residuals_of_the_decoder(trained: World, refiner: Path) -> None:
    opened = open_run(refiner)
    assert is_refiner(opened) and opened.flow.shape == (1, 12, 12)
    stage = open_store(refiner / "stages" / "stage-00", "stage")
    residual, decoded = stage.field("z"), stage.field(IMAGE)
    assert residual.dtype == decoded.dtype == torch.float16
    x = to_float(torch.from_numpy(load_images(opened.config.data).read(0, 40)))
    assert len(residual) == 80  # latents.draws = 2
    refined = decoded.float() + opened.standardisation.undo(residual.float())
    torch.testing.assert_close(refined, torch.cat([x, x]), rtol=0, atol=4e-3)
    scale = opened.standardisation  # three digits of the deviation, and no more of the mean
    digits = scale.mean / 10 ** (torch.floor(torch.log10(scale.std)) - 2)
    torch.testing.assert_close(digits, digits.round(), rtol=0, atol=1e-3)
    assert abs(float(residual.float().mean())) < 0.2
    assert 0.8 < float(residual.float().std()) < 1.25
    assert not torch.equal(decoded[:40], decoded[40:])  # each draw has its own noise
    decoded = {}
    for much in (0.0, 0.2, 5.0):
        latents = dataclasses.replace(opened.config.latents, disturb=much)
        source = ResidualSource(dataclasses.replace(opened.config, latents=latents))
        decoded[much] = source.pairs(0, 30, generator("a draw"))[1]
    away = [float((decoded[much] - decoded[0.0]).square().mean()) for much in (0.2, 5.0)]
    assert 0 < 9 * away[0] < away[1]
    manifest = read_manifest(refiner)
    assert manifest.latents.disturb == 0.2
    assert manifest.blocks[0].spec.velocity.image_channels == 1


def test_ranks_share_a_batch(refiner: Path) -> None:
    """Each process sees the images of its own samples: the mean is the loss of the whole."""
    opened = open_run(refiner)
    stage = open_store(refiner / "stages" / "stage-00", "stage")
    chosen = torch.tensor([3, 70, 12, 41, 5, 33])

    def loss(start: int, step: int) -> LfmLoss:
        source, options = generator("noise"), opened.config.matching
        rows = torch.arange(start, len(chosen), step)
        return batch_loss(opened.flow[0].velocity, stage, chosen, None, options, source, rows)

    whole, parts = loss(0, 1), [loss(0, 2), loss(1, 2)]
    assert [part.samples for part in parts] == [3, 3]
    torch.testing.assert_close(sum(part.total for part in parts) / 2, whole.total)


def test_refined_images_equal_a_direct_computation(run: Path, refiner: Path) -> None:
    opened, fine = open_run(run), open_run(refiner)
    plain, actual = images(opened), images(opened, refiner=str(refiner))
    expected = []
    for k, n in enumerate((4, 4, 2)):  # the noise of the flow, then the other
        drawn = generator(0, "sample", k)
        noise, solver = torch.randn(n, 2, 3, 3, generator=drawn), opened.config.sampler.of_block(0)
        z = opened.flow.decode(noise, solver)
        with torch.inference_mode():
            decoded = opened.autoencoder().decode(opened.standardisation.undo(z))
            noise = torch.randn(n, 1, 12, 12, generator=drawn)
            of = Condition(image=decoded.half().float())
            residual = fine.flow.decode(noise, fine.config.sampler.of_block(0), condition=of)
            expected.append(to_uint8(decoded + fine.standardisation.undo(residual)))
    assert (actual.int() - torch.cat(expected).int()).abs().max() <= 1
    assert not torch.equal(actual, plain)
    assert torch.equal(images(opened), plain)  # and are kept apart
    half = images(opened, refiner=str(refiner), precision="bf16")
    assert 0 < (half.int() - actual.int()).abs().float().mean() < 4


def test_commands_take_a_refiner(
    trained: World, run: Path, refiner: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    stand_in(monkeypatch)
    code, _, said = say(capsys, "generate", "-r", run, "-n", "4", "--refiner", refiner)
    assert code == 0 and "4 images, 30 network evaluations" in said  # 24 and 6
    words = ("generate", "-r", run, "-n", "4", "--refiner", refiner, "--nfe")
    assert "18 network" in say(capsys, *words, "29")[2]
    code, _, error = say(capsys, *words, "17")
    assert code == 2 and "step in each of 3 blocks and a refiner (18)" in error
    reference = trained.root / "pictures" / "train"
    words = ("evaluate", "-r", run, "--reference", reference, "-n", "8")
    code, _, said = say(capsys, *words, "--refiner", refiner)
    assert code == 0 and "seed 0, refined by fine)" in said
    metrics = json.loads((run / "metrics.json").read_text())
    who = open_run(refiner).fingerprint
    assert metrics["sampling"]["refiner"] == {
        "name": "fine", "run": who, "method": "midpoint", "steps": 3
    }  # fmt: skip
    assert metrics["nfe"] == 30
    assert say(capsys, *words)[0] == 0
    plain = json.loads((run / "metrics.json").read_text())
    assert set(differences(plain["sampling"], metrics["sampling"])) == {"refiner"}
    assert plain["fid"]["value"] != metrics["fid"]["value"]
    assert plain["rfid"]["value"] != metrics["rfid"]["value"]  # the floor is refined, too
    assert plain["nll_per_dim"] == pytest.approx(metrics["nll_per_dim"])
    half = (*words, "--refiner", refiner, "--set", "generate.precision=bf16")
    assert say(capsys, *half)[0] == 0  # whose floor is of a refiner in half precision
    halved = json.loads((run / "metrics.json").read_text())
    assert halved["rfid"]["value"] != metrics["rfid"]["value"]
    # a study of refined images takes no rows from another, nor lends it any
    for more in (("--refiner", refiner), (), ("--refiner", refiner)):
        assert say(capsys, *words, "--nfe-study", "30", *more)[0] == 0
        study = json.loads((run / "nfe.json").read_text())
        assert [row["nfe"] for row in study["rows"]] == [30 if more else 24]
        assert bool(study["sampling"]["refiner"]) == bool(more)


def test_an_export_contains_its_refiner(
    run: Path, refiner: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = images(open_run(run), refiner=str(refiner))
    words = ("export", "-r", run, "--out", tmp_path / "out", "--refiner", refiner)
    other = write_autoencoder(tmp_path / "other.safetensors", seed=3)
    assert "leave --autoencoder out" in say(capsys, *words, "--autoencoder", other)[2]
    assert not (tmp_path / "out").exists()
    assert say(capsys, *words)[0] == 0
    shutil.rmtree(refiner)
    moved = (tmp_path / "out").rename(tmp_path / "there")
    assert str(tmp_path) not in (moved / "config.yaml").read_text()
    after = open_run(moved)
    assert after.config.generate.refiner == str(moved / "refiner")
    assert (images(after).int() - before.int()).abs().max() <= 1
    inside = {path.name for path in (moved / "refiner").rglob("*") if path.is_file()}
    blocks = {"block-00.safetensors"}
    assert inside == {*blocks, "flow.json", "config.yaml"}  # the run has the autoencoder
    assert str(tmp_path) not in (moved / "refiner" / "config.yaml").read_text()
    (row,) = [
        line for line in (moved / "CARD.md").read_text().splitlines() if "| refiner |" in line
    ]
    assert row.startswith("| refiner | fine, ")
    assert say(capsys, "export", "-r", moved, "--out", tmp_path / "again")[0] == 0
    assert torch.equal(images(open_run(tmp_path / "again")), images(after))
    words = ("export", "-r", moved, "--out", tmp_path / "bare", "--refiner", "none")
    assert say(capsys, *words)[0] == 0
    assert not (tmp_path / "bare" / "refiner").exists()
    assert read_manifest(tmp_path / "bare").refiner is None
    # one that is lost is missed before anything is written
    shutil.rmtree(moved / "refiner")
    for verb in (("generate",), ("export", "--out", tmp_path / "lost")):
        code, _, error = say(capsys, *verb, "-r", moved)
        assert code == 2 and "cannot be used" in error and "--refiner none" in error
    assert not (tmp_path / "lost").exists()


def test_metrics_of_another_refiner_solver_are_not_exported(
    run: Path, refiner: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = open_run(run)
    plan = plan_of(opened, refiner=str(refiner))
    fid = {"n": 40, "reference": "digits", "value": 7.125, "seed": 3}
    metrics = {"fid": fid, "real_test_fid": None, "nfe": 30, "sampling": plan.identity()}
    rewrite(run / "metrics.json", json.dumps(metrics))
    words = ("export", "-r", run, "--refiner", refiner, "--out")
    assert say(capsys, *words, tmp_path / "out")[0] == 0
    text = (refiner / "config.yaml").read_text()
    assert text.count("  method: midpoint\n  steps: 3\n") == 1
    fewer = text.replace("  method: midpoint\n  steps: 3\n", "  method: midpoint\n  steps: 2\n")
    rewrite(refiner / "config.yaml", fewer)
    code, _, error = say(capsys, *words, tmp_path / "fewer")
    assert code == 2 and "measured with refiner {'name': 'fine'," in error
    assert "'steps': 3}, but" in error
    assert not (tmp_path / "fewer").exists()


def test_network_evaluations_of_a_refiner_are_counted(refiner: Path) -> None:
    assert Refiner(open_run(refiner)).nfe == 6


def test_mistakes(
    trained: World, run: Path, refiner: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*words: str | Path) -> str:
        code, _, error = say(capsys, *words)
        assert code == 2 and error.startswith("error: ")
        return error

    assert "is no refiner" in refused("generate", "-r", run, "--refiner", run)
    assert "no run at" in refused("generate", "-r", run, "--refiner", tmp_path / "nothing")
    for words in (("generate",), ("evaluate",), ("likelihood",), ("distill", "--out", run / "d")):
        assert "is a refiner, which samples the detail" in refused(*words, "-r", refiner)
    assert "is a refiner" in refused("evaluate", "-r", refiner, "-n", "1000000")  # first of all
    words = ("distill", "-r", run, "--out", tmp_path / "few")
    words += ("--set", "velocity.image_channels=1", "--set", "velocity.kind=conv")
    assert "has its teacher's velocity.image_channels, 0" in refused(*words)
    assert say(capsys, "report", "-r", refiner)[0] == 0
    assert "a run on the same autoencoder" in (refiner / "report.html").read_text()
    manifest = read_manifest(refiner)
    other = dataclasses.replace(manifest.require_autoencoder(), fingerprint="f" * 64)
    write_manifest(refiner, dataclasses.replace(manifest, autoencoder=other))
    error = refused("generate", "-r", run, "--refiner", refiner)
    assert "trained on images of another autoencoder" in error
    for name, change, said in (
        ("two", {"velocity": {"kind": "conv", "image_channels": 2}}, "has images of 1 channels"),
        ("jko", {"train": {"objective": "jko"}}, "is trained by flow matching"),
        ("pairs", {"matching": {"coupling": "ot"}}, "without pairing across"),
        ("plain", {"velocity": {"kind": "conv"}}, "applies to velocity.image_channels"),
        ("noise", {"latents": {"disturb": -1.0}}, "latents.disturb is -1.0; expected at least 0"),
        ("kind", {"velocity": {"kind": "resmlp", "image_channels": 1}}, "a single conv, unet"),
    ):
        sections = {**SECTIONS, **change}
        if name != "jko":
            sections["train"] = SECTIONS["train"]
        config = trained.config(name, **sections)
        assert said in refused("train", "-c", config, "-r", tmp_path / name)
        assert not (tmp_path / name).exists()


def test_the_default_has_no_refiner(run: Path, refiner: Path) -> None:
    opened = open_run(run)
    settings = with_guidance(opened.config.generate, refiner=str(refiner))
    assert SamplingPlan.open(opened, settings).refiner is not None
    assert with_guidance(settings, refiner="none") == opened.config.generate
    assert with_guidance(settings) == settings
    assert plan_of(opened).identity()["refiner"] is None


def test_guidance_evaluates_the_refiner_once(run: Path, refiner: Path) -> None:
    """24 evaluations of the run, 24 of the guide, and 6 of the refiner."""
    plan = plan_of(open_run(run), guidance=2.0, guide=str(run), refiner=str(refiner))
    assert plan.nfe == 54
    assert plan.within(53).nfe == 30
