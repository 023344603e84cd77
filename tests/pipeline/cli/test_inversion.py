"""`jkoflow invert`, `interpolate`, `edit`, `generate --blocks A:B` and `likelihood --against`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import jkoflow
from eval.auroc import auroc
from eval.pictures import note_of
from pipeline.cli import main
from tests.pipeline.tiny import SIDE, World, pictures, say, write_pictures

#: pixels of a picture in a strip, which doubles them, with its padding
_CELL = 2 * (SIDE + 2)


def cells(path: Path) -> np.ndarray:
    """The pictures of a strip, (rows, columns, SIDE, SIDE)."""
    strip = np.asarray(Image.open(path).convert("L"))[::2, ::2][2:, 2:]
    rows, columns = (size // (SIDE + 2) for size in strip.shape)
    parts = strip.reshape(rows, SIDE + 2, columns, SIDE + 2).transpose(0, 2, 1, 3)
    return parts[:, :, :SIDE, :SIDE].astype(int)


def test_invert_returns_to_the_images(
    trained: World, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, noise, gif = tmp_path / "s.png", tmp_path / "z.npz", tmp_path / "a.gif"
    words = ("--out", out, "--npz", noise, "--animation", gif, "-n", "3")
    assert main.main(["invert", "--run", str(run), *map(str, words)]) == 0
    assert "inversion error of 3 images" in capsys.readouterr().err
    shown = cells(out)
    assert shown.shape[:2] == (3, 9)  # images, 7 states, images on return
    assert np.array_equal(shown[:, 0], held_out(3)[:, 0])
    assert np.abs(shown[:, 1] - shown[:, -1]).max() <= 1
    model = jkoflow.load(run)
    expected = model.invert(held_out(3)).noise.numpy()
    assert np.array_equal(np.load(noise)["arr_0"], expected)
    note = json.loads(note_of(out) or "")
    assert 0 < note["inversion_mse"] < 1e-3
    with Image.open(gif) as frames:
        assert frames.n_frames == 33


def held_out(n: int) -> torch.Tensor:
    """The first images of the world's test split."""
    return torch.from_numpy(pictures(24, seed=2)[:n])[:, None]


def test_interpolation_has_both_ends(
    trained: World, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    test = trained.root / "pictures" / "test"
    words = (test / "000.png", test / "001.png", "-n", "4", "--out", tmp_path / "s.png")
    assert say(capsys, "interpolate", "--run", run, *words)[0] == 0
    model = jkoflow.load(run)
    ends = model.decode(model.encode(held_out(2)))[:, 0].numpy().astype(int)
    shown = cells(tmp_path / "s.png")[0]
    assert len(shown) == 4 and np.abs(shown[[0, -1]] - ends).max() <= 1


def test_blocks_end_in_the_samples(
    trained: World, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("generate", "--run", run, "--out", tmp_path / "s.png", "-n", "3")
    assert say(capsys, *words, "--blocks", f"0:{len(jkoflow.load(run).run.flow)}")[0] == 0
    shown = cells(tmp_path / "s.png")
    samples = jkoflow.load(run).sample(3)[:, 0].numpy()
    assert np.abs(shown[:, -1] - samples).max() <= 1
    assert np.abs(shown[:, 0] - shown[:, -1]).max() > 1


def test_an_auroc_is_that_of_the_likelihoods(
    trained: World, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inside, outside = write_pictures(tmp_path / "in", 5, seed=2), tmp_path / "out"
    outside.mkdir()
    rng = np.random.default_rng(0)
    for index in range(4):
        noise = rng.integers(0, 256, (SIDE, SIDE), np.uint8)
        Image.fromarray(noise).save(outside / f"{index}.png")
    words = ("likelihood", "--run", run, "--folder", inside, "--against", outside)
    code, out, last = say(capsys, *words)
    assert code == 0 and last.startswith("AUROC(5 inside, 4 outside) = ")
    result = json.loads((run / "auroc.json").read_text())
    scores = []
    for folder in (inside, outside):
        assert say(capsys, "likelihood", "--run", run, "--folder", folder, "-n", "4")[0] == 0
        rows = json.loads((run / "likelihood.json").read_text())["ranking"]
        scores.append([row["log_prob"] for row in rows])
    assert result["n"] == [5, 4] and 0 <= result["interval"][0] <= result["auroc"]
    say(capsys, *words, "-n", "4")
    again = json.loads((run / "auroc.json").read_text())
    assert again["auroc"] == auroc(*scores).value


@pytest.mark.parametrize(
    ("outside", "message"), [("none", "none is no folder"), ("one", "have 2 and 1 images")]
)
def test_both_folders_are_checked_before_the_work(
    trained: World, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, outside: str, message: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("pipeline.evaluation.ranking.log_probs", None)
    inside = write_pictures(tmp_path / "in", 2, seed=2)
    write_pictures(tmp_path / "one", 1, seed=3)
    words = ("--folder", inside, "--against", tmp_path / outside)
    code, _, last = say(capsys, "likelihood", "--run", run, *words)
    assert code == 2 and message in last


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("edit", "--to", "dog"), "was trained without classes"),
        (("invert", "nowhere.png"), "nowhere.png does not exist"),
        (("invert", "-n", "99"), "99 images were asked for"),
        (("invert", "-n", "0"), "-n is 0; expected 1 or more"),
        (("invert", "-n", "-1"), "-n is -1; expected 1 or more"),
        (("interpolate", ".", "b.png"), ". is a folder; expected an image"),
        (("generate", "--blocks", "0:1", "-n", "0"), "0"),
        (("generate", "--blocks", "0:1", "-n", "999"), "999"),
        (("invert", "--class", "3"), "--class needs a class-conditional run"),
        (("generate", "--blocks", "0:9"), "--blocks is 0:9; expected A:B with A below B, both"),
        (("generate", "--blocks", "2:1"), "--blocks is 2:1; expected A:B with A below B, both"),
        (("generate", "--blocks", "a"), "--blocks is 'a'; expected a number"),
        (("generate", "--blocks", "0:1", "--npz", "x.npz"), "leave --images and --npz out"),
        (("likelihood", "--against", "."), "--against compares two folders"),
        (("likelihood", "--folder", "none"), "none is no folder; expected a folder of images"),
    ],
)
def test_mistakes_are_one_sentence(
    trained: World, run: Path, capsys: pytest.CaptureFixture[str], words: tuple, message: str
) -> None:
    code, _, last = say(capsys, words[0], "--run", run, *words[1:])
    assert code == 2 and last.startswith("error: ") and message in last


def test_a_file_that_is_no_image_is_refused(
    trained: World, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.png").write_text("no image")
    code, _, last = say(capsys, "invert", "--run", run, tmp_path / "a.png")
    assert code == 2 and "could not be read" in last
