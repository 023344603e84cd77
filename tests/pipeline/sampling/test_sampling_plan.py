"""Sampling plans with a guide: images, identity, metrics, export and mistakes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from autoencoders.base import to_uint8
from flows.autoguidance import autoguide
from pipeline.config.sampling import GenerateConfig
from pipeline.distillation.distill import Distillation, student_config
from pipeline.errors import UserError
from pipeline.publishing.export import export
from pipeline.runs.directory import read_manifest, write_manifest
from pipeline.runs.run import Run, open_run
from pipeline.runtime.rng import generator
from pipeline.sampling.sampling_plan import differences, with_guidance
from tests.pipeline.drawing import images, plan_of
from tests.pipeline.glance import stand_in
from tests.pipeline.records import rewrite
from tests.pipeline.tiny import World, run_child, say, write_autoencoder


@pytest.fixture(scope="module")
def guide_home(trained_world: World) -> Path:
    """Train a smaller run on the latents of the trained run."""
    folder = trained_world.root / "guide-run"
    smaller = {"velocity": {"width": 8}, "train": {"iterations": 2}}
    config = trained_world.config("weak", **smaller)
    run_child("train", "-c", config, "--set", "name=weak", "-r", folder,
              env=trained_world.environment)  # fmt: skip
    return folder


@pytest.fixture
def guide(guide_home: Path, run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(guide_home, tmp_path / "weak"))


def by_hand(run: Run, guide: Run, w: float) -> Tensor:
    """Compute ten images in batches of four, as in the configuration."""
    count = {0: 4, 1: 4, 2: 2}
    noise = [
        torch.randn(n, 2, 3, 3, generator=generator(0, "sample", k)) for k, n in count.items()
    ]
    solver = run.config.sampler.of_block(0)
    z = autoguide(run.flow, guide.flow, w).decode(torch.cat(noise), solver)
    with torch.inference_mode():
        return to_uint8(run.autoencoder().decode(run.standardisation.undo(z)))


def test_autoguided_images_equal_a_direct_computation(run: Path, guide: Path) -> None:
    opened, weak = open_run(run), open_run(guide)
    plain = images(opened)
    for w in (0.0, 1.0, 3.0):
        actual = images(opened, guide=str(guide), guidance=w)
        assert (actual.int() - by_hand(opened, weak, w).int()).abs().max() <= 1
    assert not torch.equal(images(opened, guide=str(guide), guidance=3.0), plain)
    assert torch.equal(images(opened, guide=str(guide), guidance=1.0), plain)


def train(
    world: World, folder: Path, capsys: pytest.CaptureFixture[str], name: str, *words: str | Path,
    **sections: Mapping[str, Any],
) -> Path:  # fmt: skip
    """Train a run of a name with sections of the configuration, in a folder of this name."""
    config = world.config(name, **sections)
    assert say(capsys, "train", "-c", config, "-r", folder / name, *words)[0] == 0
    return folder / name


@pytest.mark.parametrize("interpolant", ["linear", "trigonometric"])
def test_one_block_guides_a_run_that_began_as_its_parts(
    trained_world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    interpolant: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Such a guide equals the guide whose blocks are its frozen parts."""
    monkeypatch.setenv("JKOFLOW_HOME", str(trained_world.home))

    trained = partial(train, trained_world, tmp_path, capsys)
    fm = {"train": {"objective": "fm"}, "matching": {"interpolant": interpolant}}
    strong = trained("strong", **fm)
    weak = trained("weak", velocity={"width": 8}, **fm)
    steps = {"jko": {"h": [0.2, 0.5]}, "schedule": {"free_block": True}}
    parts = trained("parts", "--init-from", strong, **steps)
    still = {"iterations": 1, "lr": 1e-12, "ema": 0.0}
    weak_parts = trained("weak-parts", "--init-from", weak, velocity={"width": 8}, train=still,
                         **steps)  # fmt: skip

    def drawn(guide: Path) -> Tensor:
        return images(open_run(parts), guide=str(guide), guidance=3.0).int()

    plain = images(open_run(parts)).int()
    assert (drawn(weak) - drawn(weak_parts)).abs().max() <= 1
    assert (drawn(weak) - plain).abs().max() > 1
    words = ("--guide", weak, "--guidance", "3", "--out", tmp_path / "out", "--dtype", "float32")
    assert say(capsys, "export", "-r", parts, *words)[0] == 0
    assert torch.equal(images(open_run(tmp_path / "out")).int(), drawn(weak))
    with pytest.raises(UserError, match="must have the objective, the interpolant and the steps"):
        drawn(trained("staged", train={"objective": "lfm"}))


def test_one_block_guides_a_run_that_continues_one_which_began_as_its_parts(
    trained_world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Its times are those of the guide's parts; those of a run with fewer blocks are not."""
    monkeypatch.setenv("JKOFLOW_HOME", str(trained_world.home))

    trained = partial(train, trained_world, tmp_path, capsys)
    strong = trained("strong", train={"objective": "fm"}, matching={"interpolant": "linear"})
    steps = {"jko": {"h": [0.2, 0.5]}, "schedule": {"free_block": True}}
    parts = trained("parts", "--init-from", strong, **steps)
    still = {"iterations": 1, "lr": 1e-12, "ema": 0.0}
    more = trained("more", "--init-from", parts, train=still, **steps)
    drawn, expected = (
        images(open_run(run), guide=str(strong), guidance=3.0).int() for run in (more, parts)
    )
    assert (drawn - expected).abs().max() <= 1
    fewer = trained("fewer", "--init-from", parts, jko={"h": [0.2]}, schedule={"free_block": True})
    with pytest.raises(UserError, match="must have the objective, the interpolant and the steps"):
        images(open_run(fewer), guide=str(strong), guidance=3.0)


def test_identity_depends_on_the_weights_of_the_guide_alone(run: Path, guide: Path) -> None:
    opened = open_run(run)
    first = plan_of(opened, guidance=2.0, guide=str(guide)).identity()
    other = plan_of(opened, guidance=2.0, guide=str(run)).identity()
    assert set(differences(first, other)) == {"guide"}
    moved = guide.rename(guide.with_name("elsewhere"))
    assert plan_of(opened, guidance=2.0, guide=str(moved)).identity() == first


def test_commands_take_a_guide(
    trained: World, run: Path, guide: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    stand_in(monkeypatch)
    led = ("--guide", guide, "--guidance", "2")
    code, _, said = say(capsys, "generate", "-r", run, "-n", "4", *led)
    assert code == 0 and "4 images, 48 network evaluations" in said
    assert "24 network" in say(capsys, "generate", "-r", run, "-n", "4", "--nfe", "40", *led)[2]
    reference = trained.root / "pictures" / "train"
    words = ("evaluate", "-r", run, "--reference", reference, "-n", "8")
    code, _, said = say(capsys, *words, *led)
    assert code == 0 and "seed 0, guidance 2 by weak)" in said
    metrics = json.loads((run / "metrics.json").read_text())
    who = {"name": "weak", "run": open_run(guide).fingerprint}
    assert metrics["sampling"]["guide"] == who and metrics["nfe"] == 48
    assert say(capsys, *words)[0] == 0
    plain = json.loads((run / "metrics.json").read_text())
    assert set(differences(plain["sampling"], metrics["sampling"])) == {"guide", "guidance"}
    assert plain["fid"]["value"] != metrics["fid"]["value"]
    assert plain["nll_per_dim"] == pytest.approx(metrics["nll_per_dim"])  # the run's own density
    assert say(capsys, *words, "--nfe-study", "96", *led)[0] == 0
    study = json.loads((run / "nfe.json").read_text())
    assert study["sampling"]["guide"] == who and study["rows"][0]["nfe"] == 96


def test_an_export_contains_its_guide(
    run: Path, guide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = images(open_run(run), guide=str(guide), guidance=2.0)
    rewrite(guide / "metrics.json", '{"run": "before it was rounded"}')
    assert say(capsys, "generate", "-r", guide)[0] == 0  # a grid of its own
    words = ("export", "-r", run, "--out", tmp_path / "out", "--guide", guide)
    assert "a guide needs a weight" in say(capsys, *words)[2]
    assert not (tmp_path / "out").exists()
    assert say(capsys, *words, "--guidance", "2")[0] == 0
    shutil.rmtree(guide)
    moved = (tmp_path / "out").rename(tmp_path / "there")
    assert str(tmp_path) not in (moved / "config.yaml").read_text()
    after = open_run(moved)
    assert after.config.generate.guide == str(moved / "guide")
    assert (images(after).int() - before.int()).abs().max() <= 1
    code, _, said = say(capsys, "generate", "-r", moved, "--guide", "none")
    assert code == 0 and "24 network" in said
    inside = {path.name for path in (moved / "guide").rglob("*") if path.is_file()}
    blocks = {f"block-{index:02d}.safetensors" for index in range(3)}
    assert inside == {*blocks, "flow.json", "config.yaml", "autoencoder.safetensors"}
    card = (moved / "CARD.md").read_text()
    (row,) = [line for line in card.splitlines() if line.startswith("| guide |")]
    assert row.startswith("| guide | weak, ") and row.endswith("; guidance 2 |")
    # exported again, with it and without
    assert say(capsys, "export", "-r", moved, "--out", tmp_path / "again")[0] == 0
    assert torch.equal(images(open_run(tmp_path / "again")), images(after))
    words = ("export", "-r", moved, "--out", tmp_path / "bare", "--guide", "none")
    assert say(capsys, *words)[0] == 0
    assert not (tmp_path / "bare" / "guide").exists()
    assert read_manifest(tmp_path / "bare").guide is None
    # a guide that is lost is missed before anything is written
    shutil.rmtree(moved / "guide")
    for verb in (("generate",), ("export", "--out", tmp_path / "lost")):
        code, _, error = say(capsys, *verb, "-r", moved)
        assert code == 2 and "cannot be used" in error and "--guide none" in error
    assert not (tmp_path / "lost").exists()
    # a distilled run follows its teacher's plain field
    student = student_config(after, Distillation())
    assert student.generate.guide is None and student.generate.guidance is None


def test_metrics_and_pictures_survive_repeated_exports(
    run: Path, guide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = open_run(run)
    plan = plan_of(opened, guidance=2.0, guide=str(guide))
    fid = {"n": 40, "reference": "digits", "value": 7.125, "seed": 3}
    metrics = {"fid": fid, "real_test_fid": None, "nfe": 48, "sampling": plan.identity()}
    rewrite(run / "metrics.json", json.dumps(metrics))
    led = ("--guide", guide, "--guidance", "2")
    assert say(capsys, "generate", "-r", run, "-n", "4", *led)[0] == 0
    drawn = (run / "samples" / "grid.png").read_bytes()
    for before, after in ((run, "a"), (tmp_path / "a", "b"), (tmp_path / "b", "c")):
        words = ("export", "-r", before, "--out", tmp_path / after)
        assert say(capsys, *words, *(led if before == run else ()))[0] == 0
    last = tmp_path / "c"
    assert json.loads((last / "metrics.json").read_text())["fid"] == fid
    assert (last / "samples" / "grid.png").read_bytes() == drawn
    assert say(capsys, "report", "-r", last)[0] == 0
    assert "by other blocks" not in (last / "report.html").read_text().lower()
    assert "7.12" in (last / "report.html").read_text()


def test_a_guide_of_more_blocks_is_not_exported(
    run: Path, guide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = plan_of(open_run(run, blocks=2), guidance=2.0, guide=str(guide))
    with pytest.raises(UserError, match="has 3 blocks and the run 2; an exported run needs"):
        export(few, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("count", [1, 2])
def test_first_blocks_are_guided_by_the_first_blocks_of_the_guide(
    run: Path, guide: Path, count: int
) -> None:
    opened, weak = open_run(run), open_run(guide)
    plan = plan_of(open_run(run, blocks=count), guidance=2.0, guide=str(guide))
    noise, solver = torch.randn(4, 2, 3, 3, generator=generator(0, "x")), plan.solvers[0]
    expected = autoguide(opened.flow[:count], weak.flow[:count], 2.0).decode(noise, solver)
    assert torch.equal(plan.flow.decode(noise, solver), expected)


def test_a_guide_is_cut_to_the_blocks_of_the_run(run: Path, guide: Path) -> None:
    plan = plan_of(open_run(run, blocks=2), guidance=2.0, guide=str(guide))
    assert len(plan.flow) == 2 and plan.guide is not None
    identity = plan.identity()
    assert identity["guide"] == {"name": "weak", "run": plan.guide.fingerprint}
    assert identity["guidance"] == 2 and identity["first_blocks"] == 2
    assert len(identity["solvers"]) == 2


def test_options_change_the_settings() -> None:
    """A weight belongs to its guide, and `none` removes both."""
    plain = GenerateConfig(guidance=2.5)
    assert with_guidance(plain) == plain == with_guidance(plain, guide="none")
    led = with_guidance(plain, guide="a")
    assert led == GenerateConfig(guide="a")
    assert with_guidance(led, 3.0) == GenerateConfig(guide="a", guidance=3.0)
    assert with_guidance(GenerateConfig(guide="a", guidance=3.0), guide="none") == GenerateConfig()


def test_weight_one_needs_no_guide_evaluations(run: Path, guide: Path) -> None:
    opened = open_run(run)
    plan = plan_of(opened, guidance=1.0, guide=str(guide))
    assert plan.networks_per_evaluation == 1 and plan.flow is opened.flow
    assert plan.nfe == 24


def test_mistakes(
    trained: World, run: Path, guide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*words: str | Path) -> str:
        code, _, error = say(capsys, "generate", "-r", run, *words)
        assert code == 2 and error.startswith("error: ")
        return error

    assert "a guide needs a weight" in refused("--guide", guide)
    assert "no run at" in refused("--guide", tmp_path / "nothing", "--guidance", "2")
    points = shutil.copytree(guide, tmp_path / "points")  # a two-dimensional run has none
    write_manifest(points, dataclasses.replace(read_manifest(points), autoencoder=None))
    assert "was trained on other latents" in refused("--guide", points, "--guidance", "2")
    assert "not negative" in refused("--guide", guide, "--guidance", "-1")
    for name, change in (
        ("steps", {"schedule": {"max_blocks": 1}}),
        ("fm", {"train": {"objective": "fm", "iterations": 1}}),
    ):
        config = trained.config(name, **change)
        assert say(capsys, "train", "-c", config, "-r", tmp_path / name)[0] == 0
        words = ("--guide", tmp_path / name, "--guidance", "2")
        assert "must have the objective, the interpolant and the steps" in refused(*words)
    other = write_autoencoder(tmp_path / "other.safetensors", seed=3)
    config = trained.config("other", autoencoder={"weights": str(other)}, train={"iterations": 1})
    assert say(capsys, "encode", "-c", config)[0] == 0
    assert say(capsys, "train", "-c", config, "-r", tmp_path / "foreign")[0] == 0
    error = refused("--guide", tmp_path / "foreign", "--guidance", "2")
    assert "was trained on other latents" in error


def test_a_guide_has_the_standardisation_of_the_run(run: Path, guide: Path) -> None:
    """A run on other images has the same autoencoder, but latents in other units."""
    manifest = read_manifest(guide)
    scale = dataclasses.replace(manifest.standardisation, std=1.1 * manifest.standardisation.std)
    write_manifest(guide, dataclasses.replace(manifest, standardisation=scale))
    with pytest.raises(UserError, match="was trained on other latents"):
        plan_of(open_run(run), guide=str(guide), guidance=2.0)


def test_a_guide_has_the_interpolant_of_the_run(
    trained_world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("JKOFLOW_HOME", str(trained_world.home))
    for name in ("linear", "trigonometric"):
        config = trained_world.config(
            name, train={"objective": "fm"}, matching={"interpolant": name}
        )
        assert say(capsys, "train", "-c", config, "-r", tmp_path / name)[0] == 0
    linear, other = (open_run(tmp_path / name) for name in ("linear", "trigonometric"))
    plan_of(linear, guide=str(linear.folder), guidance=3.0)
    with pytest.raises(UserError, match="the interpolant and the steps"):
        plan_of(linear, guide=str(other.folder), guidance=3.0)
