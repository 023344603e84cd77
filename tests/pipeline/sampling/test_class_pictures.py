"""Class-conditional runs on folders of pictures: labels, samples, metrics and mistakes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from autoencoders.base import to_uint8
from flows.autoguidance import autoguide
from flows.likelihood import log_prob
from flows.networks.condition import Condition
from pipeline.config.data import DataConfig
from pipeline.data.datasets import load_images
from pipeline.data.image_set import image_set_of
from pipeline.errors import UserError
from pipeline.evaluation.likelihood import latents_of
from pipeline.evaluation.real_images import held_out_images
from pipeline.runs.directory import read_manifest
from pipeline.runs.manifest import ClassesRecord
from pipeline.runs.run import open_run
from pipeline.runtime.rng import generator
from pipeline.sampling.class_labels import ClassLabels, condition_of, parse_classes
from pipeline.storage.shards.opening import open_store
from pipeline.storage.shards.reader import StoreReader
from pipeline.training.stages import stage_folder
from tests.pipeline import tiny as harness
from tests.pipeline.drawing import plan_of, store_of
from tests.pipeline.glance import stand_in
from tests.pipeline.tiny import World, make_world, say


def noise(first: int) -> torch.Generator:
    """Return the generator of the latents of a ranking's chunk that begins at `first`."""
    return generator(0, "likelihood", "latents", first)


def stage(folder: Path, index: int) -> StoreReader:
    return open_store(stage_folder(folder, index), "stage")


@pytest.fixture(scope="module")
def pictured(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Make folders of two classes, 10 and 30 pictures, and a finished flow-matching run."""
    world = make_world(tmp_path_factory.mktemp("pictured"))
    for split in ("train", "test"):
        folder = world.root / "pictures" / split
        for index, path in enumerate(sorted(folder.glob("*.png"))):
            home = folder / ("a" if index % 4 == 0 else "b")
            home.mkdir(exist_ok=True)
            path.rename(home / path.name)
    world.settings["velocity"]["classes"] = 2
    world.settings["train"] |= {"objective": "fm", "iterations": 60, "lr": 0.02}
    for words in (["encode"], ["train", "--run", world.root / "run"]):
        harness.run_child(*words, "--config", world.config(), env=world.environment)
    return world


@pytest.fixture
def folder(pictured: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JKOFLOW_HOME", str(pictured.home))
    return Path(shutil.copytree(pictured.root / "run", tmp_path / "run"))


def test_labels_come_from_the_folders(folder: Path) -> None:
    assert read_manifest(folder).classes == ClassesRecord([10, 30])
    assert read_manifest(folder).class_names == ["a", "b"]
    labels = stage(folder, 0).field("labels")  # two draws of each
    assert labels.tolist() == 2 * ([0] * 10 + [1] * 30)


def expected(folder: Path, labels: list[int], guidance: float, batch: int) -> Tensor:
    """Images by hand: noise carried back along the autoguide field, decoded."""
    run = open_run(folder)
    noise = [
        torch.randn(
            (min(batch, len(labels) - k), 2, 3, 3), generator=generator(0, "sample", index)
        )
        for index, k in enumerate(range(0, len(labels), batch))
    ]
    condition = Condition(torch.tensor(labels), guidance)
    moved = run.flow[0].transport(torch.cat(noise), True, condition=condition).z
    with torch.inference_mode():
        return to_uint8(run.autoencoder().decode(run.standardisation.undo(moved)))


def images(folder: Path, **changes: Any) -> StoreReader:
    return store_of(open_run(folder), **changes)


@pytest.mark.parametrize("guidance", [None, 1.5])
def test_an_image_has_the_class_asked_for(folder: Path, guidance: float | None) -> None:
    actual = images(folder, n=6, batch_size=4, labels=[1, 0], guidance=guidance)
    by_hand = expected(folder, [1, 0] * 3, guidance or 1.0, 4)
    assert (actual.field("images").int() - by_hand.int()).abs().max() <= 1
    assert actual.manifest["nfe"] == (16 if guidance else 8)
    other = images(folder, n=6, batch_size=4, labels=[0], guidance=guidance)
    assert not torch.equal(actual.field("images"), other.field("images"))


def test_random_classes_are_as_frequent_as_in_the_data(folder: Path) -> None:
    classes = ClassLabels((), (10, 30))
    labels = classes.of_samples(0, 4000, 0, "sample", 0)
    assert labels.float().mean().item() == pytest.approx(0.75, abs=0.02)
    assert torch.equal(labels, classes.of_samples(0, 4000, 0, "sample", 0))
    assert not torch.equal(labels, classes.of_samples(0, 4000, 0, "sample", 1))
    drawn = [classes.of_samples(k, 4, 0, "sample", k // 4) for k in (0, 4)]
    by_hand = expected(folder, torch.cat(drawn).tolist(), 1.0, 4)
    actual = images(folder, n=8, batch_size=4).field("images")
    assert (actual.int() - by_hand.int()).abs().max() <= 1


def test_a_grid_has_one_row_per_class(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("generate", "-r", folder, "--out", tmp_path / "g.png", "--npz", tmp_path / "g.npz")
    assert say(capsys, *words, "--class", "all")[0] == 0
    grid = np.load(tmp_path / "g.npz")["arr_0"][..., 0]
    assert len(grid) == 16  # two rows of eight
    picture = np.asarray(Image.open(tmp_path / "g.png").convert("L"))[::2, ::2]
    for row in range(2):
        for column in range(8):
            top, left = 2 + row * 14, 2 + column * 14
            cell = picture[top : top + 12, left : left + 12]
            assert np.array_equal(cell, grid[2 * column + row])


def test_evaluate_likelihood_export(
    folder: Path, pictured: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    stand_in(monkeypatch)
    words = ("evaluate", "-r", folder, "--reference", pictured.root / "pictures" / "train" / "b")
    code, _, said = say(capsys, *words, "--guidance", "1.5")
    assert code == 0 and "seed 0, guidance 1.5" in said
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["sampling"]["guidance"] == 1.5 and metrics["nll"]["given"] == "class"
    assert metrics["nfe"] == 16
    assert say(capsys, *words)[0] == 0
    plain = json.loads((folder / "metrics.json").read_text())
    assert plain["sampling"]["guidance"] == 1 and plain["fid"]["value"] != metrics["fid"]["value"]
    # likelihood.json holds log p(z | y)
    assert say(capsys, "likelihood", "-r", folder, "-n", "20")[0] == 0
    rows = json.loads((folder / "likelihood.json").read_text())["ranking"]
    run = open_run(folder)
    test = load_images(dataclasses.replace(run.config.data, split="test"))
    z = latents_of(run, test, np.arange(20), torch.device("cpu"), noise(0))
    labels = torch.from_numpy(np.asarray(test.labels[:20]))  # type: ignore[index]
    assert sorted(labels.tolist()) == [0] * 6 + [1] * 14
    by_hand = log_prob(run.flow, z, condition=Condition(labels)).value
    actual = {row["index"]: row["log_prob"] for row in rows}
    assert [actual[k] for k in range(20)] == pytest.approx(by_hand.tolist(), abs=1e-2)
    # an export generates the same
    assert say(capsys, "export", "-r", folder, "--out", tmp_path / "out")[0] == 0
    first, again = (
        images(f, labels=[1]).field("images").int() for f in (folder, tmp_path / "out")
    )
    assert (first - again).abs().max() <= 1
    assert "fm, linear interpolant" in (tmp_path / "out" / "CARD.md").read_text()
    assert "2 classes (left out with 0.1)" in (tmp_path / "out" / "CARD.md").read_text()


def test_classes_of_another_folder_are_matched_by_name(
    folder: Path, pictured: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A folder that has the second class alone gives it the number 0."""
    test = pictured.root / "pictures" / "test"
    shutil.copytree(test / "b", tmp_path / "some" / "b")
    words = ("likelihood", "-r", folder, "--folder", tmp_path / "some", "-n", "14")
    assert say(capsys, *words)[0] == 0
    actual = json.loads((folder / "likelihood.json").read_text())["ranking"]
    assert {row["label"] for row in actual} == {"b"}
    run = open_run(folder)
    some = load_images(DataConfig("folder", path=str(tmp_path / "some"), size=12, mode="L"))
    assert some.labels is not None and set(some.labels.tolist()) == {0}
    z = latents_of(run, some, np.arange(14), torch.device("cpu"), noise(0))
    by_hand = log_prob(run.flow, z, condition=Condition(torch.ones(14).long())).value
    ranked = {row["index"]: row["log_prob"] for row in actual}
    assert [ranked[k] for k in range(14)] == pytest.approx(by_hand.tolist(), abs=1e-2)
    # so are those of its own test split, of which one may be missing
    config = run.config
    split = tmp_path / "split"
    shutil.copytree(pictured.root / "pictures" / "train", split / "train")
    shutil.copytree(test / "b", split / "test" / "b")
    data = dataclasses.replace(config.data, path=str(split))
    moved = dataclasses.replace(run, config=dataclasses.replace(config, data=data))
    condition = condition_of(moved, held_out_images(data), np.arange(14))
    assert condition is not None and condition.labels.tolist() == [1] * 14
    # a class that the run does not have is refused
    (tmp_path / "some" / "b").rename(tmp_path / "some" / "c")
    code, _, error = say(capsys, *words)
    assert code == 2 and "has no class 'c'; name the subfolders as" in error and "a, b" in error


def test_a_class_has_the_name_of_its_folder(folder: Path) -> None:
    run = open_run(folder)
    assert parse_classes(run, ["b", "a", "1"]) == [1, 0, 1]
    # numbers that are names are names
    digits = dataclasses.replace(
        run, manifest=dataclasses.replace(run.manifest, class_names=["1", "0"])
    )
    assert parse_classes(digits, ["1", "0", "all"]) == [0, 1, 0, 1]


def test_a_budget_counts_guidance_twice(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("generate", "-r", folder, "-n", "2", "--nfe", "16")
    assert "16 network evaluations" in say(capsys, *words, "--guidance", "2")[2]
    assert "16 network evaluations" in say(capsys, *words)[2]
    code, _, said = say(capsys, *words[:-1], "7", "--guidance", "2")
    assert code == 2 and "(8)" in said


def test_a_guide_without_classes(
    pictured: World, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A guide without classes serves a run with classes."""
    config = pictured.config("all", velocity={"classes": 0}, train={"iterations": 20})
    assert say(capsys, "train", "-c", config, "-r", tmp_path / "all")[0] == 0
    led = {"guide": str(tmp_path / "all"), "guidance": 2.0}
    actual = images(folder, n=8, batch_size=4, labels=[1, 0], **led).field("images")
    run, of = open_run(folder), Condition(torch.tensor([1, 0, 1, 0]))
    flow = autoguide(run.flow, open_run(tmp_path / "all").flow, 2.0)
    noise = torch.randn(4, 2, 3, 3, generator=generator(0, "sample", 0))
    with torch.inference_mode():
        z = flow.decode(noise, run.config.sampler.of_block(0), condition=of)
        expected = to_uint8(run.autoencoder().decode(run.standardisation.undo(z)))
    assert (actual[:4].int() - expected.int()).abs().max() <= 1
    plain = images(folder, n=8, batch_size=4, labels=[1, 0]).field("images")
    assert not torch.equal(plain, actual)
    # a guide with classes is asked for that of none, which it must have seen
    config = pictured.config("never", velocity={"class_dropout": 0.0}, train={"iterations": 1})
    assert say(capsys, "train", "-c", config, "-r", tmp_path / "never")[0] == 0
    words = ("generate", "-r", folder, "--guidance", "2", "--guide", tmp_path / "never")
    code, _, error = say(capsys, *words)
    assert code == 2 and "was trained with class_dropout=0, but a guide is" in error


def test_a_study_keeps_guidance_apart(
    pictured: World,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stand_in(monkeypatch)
    reference = pictured.root / "pictures" / "train" / "b"
    words = ("evaluate", "-r", folder, "-n", "8", "--reference", reference, "--nfe-study")
    studies = []
    for more in (("16",), ("32", "--guidance", "2"), ("16",)):
        assert say(capsys, *words, *more)[0] == 0
        studies.append(json.loads((folder / "nfe.json").read_text()))
    assert [study["sampling"]["guidance"] for study in studies] == [1.0, 2.0, 1.0]
    assert [[row["nfe"] for row in study["rows"]] for study in studies] == [[16], [32], [16]]
    assert studies[0] == studies[2]
    assert studies[0]["rows"][0]["fid"] != studies[1]["rows"][0]["fid"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--class", "2"), "--class must lie between 0 and 1 for the run at"),
        (("--class", "-1"), "--class must lie between 0 and 1 for the run at"),
        (("--class", "seven"), "the class is 'seven'; expected the name or number of a class"),
        (("--guidance", "-1"), "not negative, found -1.0"),
        (("--guidance", "nan"), "found nan"),
    ],
)
def test_mistakes(
    folder: Path, words: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, error = say(capsys, "generate", "-r", folder, *words)
    assert code == 2 and error.startswith("error: ") and named in error


@pytest.mark.parametrize("words", [("--class", "1"), ("--class", "all"), ("--guidance", "1.5")])
def test_a_run_without_classes_refuses_labels(
    trained: World, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, error = say(capsys, "generate", "-r", trained.root / "run", *words)
    assert code == 2 and error.startswith(f"error: {words[0]} needs a class-conditional run")


def test_a_run_without_classes_takes_the_weight_1_of_its_own_flow(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = []
    for name, words in (("plain", ()), ("one", ("--guidance", "1"))):
        path = tmp_path / f"{name}.npz"
        assert say(capsys, "generate", "-r", run, "-n", "3", "--npz", path, *words)[0] == 0
        with np.load(path) as arrays:
            images.append(arrays["arr_0"])
    np.testing.assert_array_equal(*images)


def test_guidance_needs_class_dropout(
    pictured: World, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = {"max_blocks": 1, "free_block": False}
    jko = {"train": {"objective": "jko", "iterations": 1}, "schedule": one}
    never = {"velocity": {"class_dropout": 0.0}}
    for name, sections in (("never", never), ("jko", never | jko)):
        config, run = pictured.config(name, **sections), tmp_path / name
        assert say(capsys, "train", "-c", config, "-r", run)[0] == 0
        code, _, error = say(capsys, "generate", "-r", run, "--guidance", "1.5")
        assert code == 2 and "was trained with class_dropout=0" in error
        assert say(capsys, "generate", "-r", run, "-n", "2", "--class", "1")[0] == 0


def test_images_without_classes_are_refused(
    trained: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = trained.config("labelled", velocity={"classes": 2})
    code, _, error = say(capsys, "train", "-c", config, "-r", tmp_path / "run")
    assert code == 2 and "the data set has no labels" in error and "sort the images" in error


def test_a_run_without_classes_has_no_entry_for_them(trained: World) -> None:
    run = open_run(trained.root / "run")
    assert run.manifest.classes is None
    assert "labels" not in stage(run.folder, 0).manifest["identity"]
    assert plan_of(run).identity()["classes"] is None


def test_folders_without_classes_are_separated_by_the_null_label(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inside, outside = (
        harness.write_pictures(tmp_path / name, 3, seed) for name, seed in (("in", 5), ("out", 6))
    )
    words = ("likelihood", "-r", folder, "--folder", inside, "--against", outside)
    code, _, said = say(capsys, *words)
    assert code == 0 and said.startswith("AUROC(3 inside, 3 outside)")


def test_inversion_matches_the_classes_of_a_folder_by_name(
    folder: Path, pictured: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A test split that has the second class alone gives it the number 0."""
    split = tmp_path / "split"
    for part in ("train", "test/b"):
        shutil.copytree(pictured.root / "pictures" / part, split / part)
    words = ("invert", "-r", folder, "-n", "3", "--set", f"data.path={split}")
    noises = []
    for name, given in (("own", ()), ("named", ("--class", "b"))):
        out = ("--out", tmp_path / f"{name}.png", "--npz", tmp_path / f"{name}.npz")
        assert say(capsys, *words, *given, *out)[0] == 0
        noises.append(np.load(tmp_path / f"{name}.npz")["arr_0"])
    assert np.array_equal(*noises)
    (split / "test" / "b").rename(split / "test" / "c")
    code, _, error = say(capsys, *words)
    assert code == 2 and "has no class 'c'; name the subfolders as" in error


def test_classes_go_on_in_turn() -> None:
    """A batch whose size is no multiple of their number begins where the last one ended."""
    labels = ClassLabels((4, 5, 6), ())
    whole = labels.of_samples(0, 8).tolist()
    assert whole == [4, 5, 6, 4, 5, 6, 4, 5]
    assert labels.of_samples(0, 4).tolist() + labels.of_samples(4, 4).tolist() == whole


def test_a_label_beyond_the_classes_is_refused(folder: Path) -> None:
    run, x = open_run(folder), np.zeros((2, 1, 12, 12), np.uint8)
    for labels in ([0, 2], [-1, 1]):  # 2 is the null label, which is no class
        images = image_set_of(x, np.array(labels), "own")
        with pytest.raises(UserError, match="needs a class from 0 to 1 for every image"):
            condition_of(run, images, np.arange(2))
