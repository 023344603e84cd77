"""The explorer computes what the commands compute."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import jkoflow
from autoencoders.base import to_float
from flows.likelihood import log_prob
from pipeline.errors import UserError
from pipeline.explore.explorer import Choice, Explorer
from pipeline.runs.run import open_run
from pipeline.runtime.rng import generator
from pipeline.storage import atomic
from tests.pipeline.tiny import World, pictures, say

SHOWN = 4  # a batch of the tiny configuration


@pytest.fixture
def explorer(trained: World) -> Explorer:
    return Explorer(open_run(trained.root / "run"), torch.device("cpu"))


def generate(run: Path, tmp_path: Path, capsys: object, *options: object) -> np.ndarray:
    copy = shutil.copytree(run, tmp_path / "copy", dirs_exist_ok=True)
    npz = tmp_path / "samples.npz"
    words = ("generate", "--run", copy, "-n", SHOWN, "--npz", npz, *map(str, options))
    assert say(capsys, *words)[0] == 0
    return np.load(npz)["arr_0"].transpose(0, 3, 1, 2)


def test_samples_are_those_of_generate(
    explorer: Explorer, trained: World, tmp_path: Path, capsys: object
) -> None:
    for choice, options in (
        (Choice(seed=3), ("--seed", 3)),
        (Choice(steps=1), ("--steps", 1)),
        (Choice(blocks=2), ("--blocks", 2)),
    ):
        expected = generate(trained.root / "run", tmp_path, capsys, *options)
        assert np.array_equal(explorer.sample(choice).numpy(), expected)


def test_between_two_seeds(explorer: Explorer) -> None:
    first, second = explorer.sample(Choice(seed=3)), explorer.sample(Choice(seed=8))
    ends = [explorer.sample(Choice(seed=3, other=8, mix=mix)) for mix in (0.0, 1.0)]
    assert torch.equal(ends[0], first)
    assert (ends[1].int() - second.int()).abs().max() <= 1  # cos(π/2) is 6e-17 in floats
    noise = [torch.randn((4, 2, 3, 3), generator=generator(seed, "sample", 0)) for seed in (3, 8)]
    half = math.cos(math.pi / 4) * (noise[0] + noise[1])
    run = explorer.run
    z = run.flow.decode(half, run.config.sampler.of_blocks(3))
    decoded = run.autoencoder().decode(run.standardisation.undo(z))
    expected = ((decoded + 1) * 127.5).round().clamp(0, 255)
    middle = explorer.sample(Choice(seed=3, other=8, mix=0.5))
    assert (middle.float() - expected).abs().max() <= 1


def test_along_the_blocks(explorer: Explorer) -> None:
    run = explorer.run
    noise = torch.randn((4, 2, 3, 3), generator=generator(0, "sample", 0))
    states = [explorer.sample(Choice(passed=passed)) for passed in range(4)]
    assert torch.equal(states[3], explorer.sample(Choice()))
    decoded = run.autoencoder().decode(run.standardisation.undo(noise))
    assert torch.equal(states[0].float(), ((decoded + 1) * 127.5).round().clamp(0, 255))
    z = run.flow[2:].decode(noise, run.config.sampler.of_blocks(3)[2:])
    decoded = run.autoencoder().decode(run.standardisation.undo(z))
    assert torch.equal(states[1].float(), ((decoded + 1) * 127.5).round().clamp(0, 255))


def test_an_image_is_inverted_and_measured(
    explorer: Explorer, trained: World, tmp_path: Path
) -> None:
    Image.fromarray(pictures(1, 5)[0]).save(tmp_path / "image.png")
    image = explorer.read(tmp_path / "image.png")
    assert np.array_equal(image[0, 0].numpy(), pictures(1, 5)[0])
    result = explorer.invert(image)
    difference = (result.reconstruction.int() - result.from_noise.int()).abs()
    assert difference.max() <= 2 and result.noise.shape == (1, 3, 6)
    run, text = explorer.run, explorer.likelihood(image)
    assert "its place in the test split is unknown" in text
    value = float(text.split("log p(z) = ")[1].split()[0])
    moments = run.autoencoder().encode(to_float(image))
    z = run.standardisation.apply(moments.sample(generator(0, "likelihood", "latents", 0)))
    assert value == pytest.approx(float(log_prob(run.flow, z).value), abs=0.02)
    rows = [{"log_prob": value + change} for change in (-1.0, 1.0, 2.0)]
    copy = Path(shutil.copytree(run.folder, tmp_path / "run"))
    atomic.write_json(
        copy / "likelihood.json",
        {"run": run.fingerprint, "data": "tiny test", "ranking": rows},
    )
    ranked = Explorer(open_run(copy), torch.device("cpu")).likelihood(image)
    assert "2 of 3 images of tiny test are more likely" in ranked


@pytest.mark.parametrize("content", [b"no image", b"", b"\x89PNG\r\n\x1a\nbroken"])
def test_a_file_that_is_no_image(explorer: Explorer, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "notes.txt").write_bytes(content)
    with pytest.raises(UserError, match="notes.txt is no image that can be read; give a PNG"):
        explorer.read(tmp_path / "notes.txt")


def test_an_edit_is_that_of_the_python_interface() -> None:
    explorer = Explorer(open_run(Path("zoo:mnist-classes")), torch.device("cpu"))
    image = explorer.sample(Choice(label=3))[:1]
    edited = explorer.edit(image, target=8, strength=0.5, label=3)
    model = jkoflow.load("zoo:mnist-classes")
    assert torch.equal(edited, model.edit(image, to="8", strength=0.5, classes="3"))
    assert (edited.int() - image.int()).abs().float().mean() > 2


def test_a_run_without_classes_has_no_edit(explorer: Explorer) -> None:
    with pytest.raises(UserError, match="trained without classes"):
        explorer.edit(torch.zeros((1, 1, 12, 12), dtype=torch.uint8), target=0, strength=0.5)
